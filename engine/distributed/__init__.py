"""Process groups, collectives, averaged gradients, sharded models and hang reports."""

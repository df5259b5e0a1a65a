"""Process groups, collectives, averaged gradients, sharded models, hang reports."""

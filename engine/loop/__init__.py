"""The run loop on Ignite: events, listeners, position."""

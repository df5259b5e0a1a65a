"""Training stages and curricula: settings that change during a run."""

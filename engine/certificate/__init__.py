"""The certificate: checks the invariances on a user's own model, loss and batch."""

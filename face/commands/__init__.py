"""The commands of the command line, each a module that is imported when it runs."""

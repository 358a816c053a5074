"""From an artifact and a user id to ranked items, on the command line and over HTTP."""

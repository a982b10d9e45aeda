"""The passes that come with optkit; one file, one pass."""

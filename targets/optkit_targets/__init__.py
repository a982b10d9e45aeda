"""The targets and packagers that come with optkit."""

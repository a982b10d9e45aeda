"""Device descriptions, one TOML file each."""

"""The named recipes, a YAML file each."""

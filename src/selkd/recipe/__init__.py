"""A recipe: its parts, what each allows, what they ask of each other, and how YAML becomes one."""

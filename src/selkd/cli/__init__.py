"""The command line: its commands read options, call the rooms below when they run, and print."""

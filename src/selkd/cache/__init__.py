"""The teacher's drawn classes on disk: coded, written whole, verified, and found by a sample's content."""

"""Teachers from elsewhere: a server that gives log-probabilities, and files of them that others wrote."""

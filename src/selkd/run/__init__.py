"""What ``selkd distill`` does: score, cache, train, evaluate and report, into one folder."""

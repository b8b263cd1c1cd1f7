"""``python -m selkd``, for launchers that start Python modules (``torchrun -m selkd distill …``)."""

from selkd.cli.main import main

if __name__ == "__main__":
    main()

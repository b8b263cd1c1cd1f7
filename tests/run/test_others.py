"""What the processes of a run tell each other."""

from typing import Any

from torch.distributed import HashStore

from selkd.run.others import Ended, Others


def others(store: Any, rank: int, number: int = 1) -> Others:
    return Others(store, rank, 2, number)


def test_the_first_word_is_heard_by_all_and_not_in_the_next_run() -> None:
    store = HashStore()
    others(store, 0).ask("SIGTERM")
    others(store, 0).tell(Ended(0, 2, "data.path: no such file"))
    others(store, 1).tell(Ended(1, 1, "what followed from it"))
    assert others(store, 1).look() == ("SIGTERM", Ended(0, 2, "data.path: no such file"))
    assert others(store, 1, number=2).look() == (None, None)


def test_a_store_that_is_lost_tells_nothing() -> None:
    class Lost:
        def check(self, names: list[str]) -> bool:
            return names == ["selkd/1/ended"]

        def get(self, _: str) -> bytes:
            raise RuntimeError("connection reset")

    assert others(Lost(), 1).look() == (None, None)

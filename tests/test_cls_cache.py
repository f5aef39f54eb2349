"""The CLS cache: bounded by bytes, the least used goes first, and no key of another backbone fits."""

import torch

from service.cls_cache import ENTRY_OVERHEAD_BYTES, ClsCache

D = 8
ENTRY_BYTES = 4 * D + ENTRY_OVERHEAD_BYTES


def cache(num_entries: int = 3, fingerprint: str = "a" * 64, variant: str = "torch-float32") -> ClsCache:
    return ClsCache(num_entries * ENTRY_BYTES, fingerprint, variant)


def vector(value: float) -> torch.Tensor:
    return torch.full((D,), value, dtype=torch.float32)


def test_it_gives_back_what_was_put() -> None:
    opened = cache()
    opened.put(opened.key(b"picture"), vector(1.0))
    found = opened.get(opened.key(b"picture"))
    assert found is not None and torch.equal(found, vector(1.0))
    assert opened.get(opened.key(b"another")) is None
    assert (opened.statistics.num_hits, opened.statistics.num_misses) == (1, 1)


def test_the_least_used_goes_first_and_the_bound_holds() -> None:
    opened = cache(3)
    for i in range(3):
        opened.put(bytes([i]), vector(i))
    opened.get(bytes([0]))
    opened.put(bytes([3]), vector(3))
    assert [opened.peek(bytes([i])) is not None for i in range(4)] == [True, False, True, True]
    for i in range(100):
        opened.put(bytes([i]), vector(i))
        assert opened.statistics.size_bytes <= 3 * ENTRY_BYTES
    assert opened.statistics.num_entries == 3


def test_the_same_picture_twice_is_kept_once() -> None:
    opened = cache()
    for _ in range(5):
        opened.put(b"key", vector(1.0))
    assert (opened.statistics.num_entries, opened.statistics.size_bytes) == (1, ENTRY_BYTES)


def test_nothing_is_kept_in_no_bytes() -> None:
    opened = cache(0)
    opened.put(b"key", vector(1.0))
    assert opened.get(b"key") is None
    assert opened.statistics.size_bytes == 0


def test_keys_differ_by_picture_backbone_and_runtime() -> None:
    keys = {
        cache().key(b"picture"),
        cache().key(b"picturf"),
        cache(fingerprint="b" * 64).key(b"picture"),
        cache(variant="openvino-int8-0123456789ab").key(b"picture"),
    }
    assert len(keys) == 4 and all(len(key) == 32 for key in keys)


def test_a_kept_vector_does_not_hold_its_batch_in_memory() -> None:
    opened, batch_BD = cache(), torch.zeros(64, D)
    opened.put(b"key", batch_BD[3])
    found = opened.get(b"key")
    assert found is not None and found.untyped_storage().nbytes() == 4 * D
    batch_BD += 1.0
    assert torch.equal(found, vector(0.0))

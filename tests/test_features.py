"""CLS features: computed once for every picture, in the right order, whatever else lies in the folder."""

import dataclasses
import shutil
import sqlite3
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
import torch
from pictures import encoded, noise, write_classes, write_splits

from model_store.backbone import Backbone, BackboneArtefact
from model_store.decoding import ImageLimits
from model_store.errors import InvalidDataset, ToscaError
from model_store.preprocess import load_pixels
from training.embedding import BATCH_SIZE
from training.feature_cache import FeatureCache
from training.features import LabelledFeatures, extract_each, extract_features, hash_source, the_only
from training.sources import open_source


def cache(folder: Path, backbone: Backbone) -> FeatureCache:
    return FeatureCache(folder, backbone.fingerprint, backbone.variant, backbone.feature_dim)


def extract(data: Path, backbone: Backbone, folder: Path, **options: object) -> LabelledFeatures:
    return extract_features(
        open_source(data, min_images_per_class=1),
        backbone,
        cache(folder, backbone),
        show_progress=False,
        **options,  # type: ignore[arg-type]
    )


def assert_same_features(one: LabelledFeatures, other: LabelledFeatures) -> None:
    assert torch.equal(one.cls_ND, other.cls_ND) and torch.equal(one.label_N, other.label_N)
    assert (one.labels, one.splits, one.data_sha256) == (other.labels, other.splits, other.data_sha256)


class CountingBackbone:
    """The tiny backbone, which remembers how many pictures it was given."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.num_embedded = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._backbone, name)

    def embed(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        self.num_embedded += pixels_BCHW.shape[0]
        return self._backbone.embed(pixels_BCHW)


@pytest.fixture
def counting(tiny_backbone: Backbone) -> CountingBackbone:
    return CountingBackbone(tiny_backbone)


def test_features_are_the_cls_of_every_picture_in_order(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_splits(tmp_path / "data", train=7, test=2)
    features = extract(data, tiny_backbone, tmp_path / "cache")
    pictures = open_source(data).pictures
    assert len(pictures) == 27 > BATCH_SIZE
    for i, one in enumerate(pictures):
        pixels_CHW = load_pixels(one.path.read_bytes(), tiny_backbone.preprocessing, ImageLimits())
        expected_1D = tiny_backbone.embed(pixels_CHW[None])
        torch.testing.assert_close(features.cls_ND[i : i + 1], expected_1D, rtol=0, atol=1e-4)
        assert features.labels[int(features.label_N[i])] == one.label
        assert features.splits[i] == one.split
    assert (features.num_computed, features.skipped) == (27, ())
    assert features.cls_ND.dtype == torch.float32


def test_rows_of_the_splits_are_all_rows(tmp_path: Path, tiny_backbone: Backbone) -> None:
    features = extract(
        write_splits(tmp_path / "data", train=3, val=1, test=2), tiny_backbone, tmp_path / "cache"
    )
    rows = [features.rows(split) for split in ("train", "val", "test")]
    assert [len(one) for one in rows] == [9, 3, 6]
    assert torch.equal(torch.cat(rows), torch.arange(18))


def test_a_second_run_computes_nothing(tmp_path: Path, counting: CountingBackbone) -> None:
    data = write_classes(tmp_path / "data", 6)
    first = extract(data, counting, tmp_path / "cache")  # type: ignore[arg-type]
    assert (first.num_computed, counting.num_embedded) == (18, 18)
    second = extract(data, counting, tmp_path / "cache")  # type: ignore[arg-type]
    assert (second.num_computed, counting.num_embedded) == (0, 18)
    assert_same_features(first, second)


def test_only_new_pictures_are_computed(tmp_path: Path, counting: CountingBackbone) -> None:
    data = write_classes(tmp_path / "data", 3)
    extract(data, counting, tmp_path / "cache")  # type: ignore[arg-type]
    write_classes(data, 5)
    again = extract(data, counting, tmp_path / "cache")  # type: ignore[arg-type]
    assert (again.num_computed, len(again.label_N)) == (6, 15)


def test_a_moved_folder_computes_nothing(tmp_path: Path, counting: CountingBackbone) -> None:
    data = write_classes(tmp_path / "data", 3)
    first = extract(data, counting, tmp_path / "cache")  # type: ignore[arg-type]
    shutil.move(data, tmp_path / "elsewhere")
    moved = extract(tmp_path / "elsewhere", counting, tmp_path / "cache")  # type: ignore[arg-type]
    assert moved.num_computed == 0
    assert_same_features(first, moved)


def test_the_same_picture_twice_is_computed_once(tmp_path: Path, counting: CountingBackbone) -> None:
    data = write_classes(tmp_path / "data", 2)
    for i in range(20):
        shutil.copy(data / "red/000.png", data / f"red/copy{i}.png")
    features = extract(data, counting, tmp_path / "cache")  # type: ignore[arg-type]
    assert (features.num_computed, counting.num_embedded, len(features.label_N)) == (6, 6, 26)
    red_ND = features.cls_ND[features.label_N == features.labels.index("red")]
    assert torch.unique(red_ND, dim=0).shape[0] == 2


def test_a_changed_picture_is_computed_again(tmp_path: Path, counting: CountingBackbone) -> None:
    data = write_classes(tmp_path / "data", 2)
    before = extract(data, counting, tmp_path / "cache")  # type: ignore[arg-type]
    (data / "red/000.png").write_bytes(encoded(noise(4)))
    after = extract(data, counting, tmp_path / "cache")  # type: ignore[arg-type]
    assert after.num_computed == 1
    assert after.data_sha256 != before.data_sha256


def test_another_backbone_has_its_own_cache(tmp_path: Path, tiny_artefact: BackboneArtefact) -> None:
    data, folder = write_classes(tmp_path / "data", 2), tmp_path / "cache"
    backbone = Backbone.load(tiny_artefact, "cpu")
    extract(data, backbone, folder)
    preprocessing = tiny_artefact.manifest.preprocessing.model_copy(update={"crop_fraction": 0.5})
    manifest = tiny_artefact.manifest.model_copy(update={"preprocessing": preprocessing})
    cropped = Backbone.load(dataclasses.replace(tiny_artefact, manifest=manifest), "cpu")
    assert extract(data, cropped, folder).num_computed == 6
    assert extract(data, backbone, folder).num_computed == 0


def test_another_runtime_has_its_own_cache(tmp_path: Path, tiny_artefact: BackboneArtefact) -> None:
    data, folder = write_classes(tmp_path / "data", 2), tmp_path / "cache"
    full = extract(data, Backbone.load(tiny_artefact, "cpu", "torch-float32"), folder)
    rough = extract(data, Backbone.load(tiny_artefact, "cpu", "torch-bfloat16"), folder)
    assert (full.num_computed, rough.num_computed) == (6, 6)
    assert not torch.equal(full.cls_ND, rough.cls_ND)


def test_the_cache_gives_back_what_was_put(tmp_path: Path) -> None:
    opened = FeatureCache(tmp_path / "new" / "cache", "f" * 64, "float32", 3)
    vectors = {f"{i:064d}": torch.randn(3) for i in range(1200)}
    opened.put(vectors)
    found = FeatureCache(tmp_path / "new" / "cache", "f" * 64, "float32", 3).get([*vectors, "absent"])
    assert found.keys() == vectors.keys()
    assert all(torch.equal(found[digest], vectors[digest]) for digest in vectors)


def test_a_cached_vector_of_the_wrong_size_counts_as_absent(tmp_path: Path) -> None:
    opened = FeatureCache(tmp_path, "f" * 64, "float32", 3)
    opened.put({"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(5, dtype=torch.uint8)})
    assert set(opened.get(["a", "b", "c"])) == {"b"}


def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    def faulty(folder: Path) -> AbstractContextManager[object]:
        return pytest.raises(ToscaError, match=rf"feature cache {folder}/cls-.*: .* only a cache: delete it")

    (tmp_path / "file").touch()
    with faulty(tmp_path / "file"):
        FeatureCache(tmp_path / "file", "f" * 64, "float32", 3)
    opened = FeatureCache(tmp_path, "f" * 64, "float32", 3)
    with closing(sqlite3.connect(opened.path)) as database:
        database.execute("DROP TABLE cls")
    with faulty(tmp_path):
        opened.get(["a"])
    with faulty(tmp_path):
        opened.put({"a": torch.zeros(3)})
    for suffix in ("-wal", "-shm"):
        Path(f"{opened.path}{suffix}").unlink(missing_ok=True)
    opened.path.write_bytes(b"no database" * 1000)
    with faulty(tmp_path):
        FeatureCache(tmp_path, "f" * 64, "float32", 3)


def test_the_data_digest_ignores_where_the_pictures_lie(tmp_path: Path, tiny_backbone: Backbone) -> None:
    one = extract(write_classes(tmp_path / "one", 2), tiny_backbone, tmp_path / "cache")
    same = extract(write_classes(tmp_path / "same", 2), tiny_backbone, tmp_path / "cache")
    relabelled = extract(
        write_classes(tmp_path / "relabelled", 2, labels=("blue", "green", "rot")),
        tiny_backbone,
        tmp_path / "cache",
    )
    assert one.data_sha256 == same.data_sha256 != relabelled.data_sha256


# -- repeats, in training ----------------------------------------------------------------------------


def extract_to_train(data: Path, backbone: Backbone, folder: Path) -> LabelledFeatures:
    hashed = dataclasses.replace(
        hash_source(open_source(data, min_images_per_class=1)), min_images_per_class=1
    )
    return the_only(extract_each([hashed], backbone, cache(folder, backbone), show_progress=False))


def test_a_picture_trains_once_however_often_it_is_there(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_classes(tmp_path / "data", 3)
    plain = extract_to_train(data, tiny_backbone, tmp_path / "cache")
    assert_same_features(plain, extract(data, tiny_backbone, tmp_path / "cache"))
    assert plain.skipped == ()
    for name in ("a", "z"):
        shutil.copy(data / "red/001.png", data / f"red/{name}.png")
    features = extract_to_train(data, tiny_backbone, tmp_path / "cache")
    assert_same_features(features, plain)
    assert features.skipped == (f"2 picture(s) repeated; first: {data}/red/a.png is {data}/red/001.png",)


def test_a_copy_of_a_training_picture_is_no_evidence(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_splits(tmp_path / "data", train=4, val=3, test=3)
    plain = extract_to_train(data, tiny_backbone, tmp_path / "cache")
    shutil.copy(data / "train/red/002.png", data / "test/red/x.png")
    shutil.copy(data / "train/red/002.png", data / "val/red/x.png")
    shutil.copy(data / "val/blue/000.png", data / "test/blue/y.png")
    features = extract_to_train(data, tiny_backbone, tmp_path / "cache")
    assert_same_features(features, plain)
    assert features.skipped == (
        f"1 picture(s) of val also in train; first: {data}/val/red/x.png is {data}/train/red/002.png",
        f"1 picture(s) of test also in val; first: {data}/test/blue/y.png is {data}/val/blue/000.png",
        f"1 picture(s) of test also in train; first: {data}/test/red/x.png is {data}/train/red/002.png",
    )


def test_a_split_of_nothing_but_training_pictures_is_refused(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_splits(tmp_path / "data", train=3)
    shutil.copytree(data / "train", data / "test")
    fault = r"data: test has no pictures of its own: 9 picture\(s\) of test also in train; first: .*/test/blue/000"
    with pytest.raises(InvalidDataset, match=fault):
        extract_to_train(data, tiny_backbone, tmp_path / "cache")


def test_a_picture_under_two_labels_is_refused(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_splits(tmp_path / "data", train=3, test=2)
    shutil.copy(data / "train/red/000.png", data / "test/blue/x.png")
    fault = r"1 picture\(s\) have two labels; first: .*/train/red/000.png is 'red', .*/test/blue/x.png 'blue'"
    with pytest.raises(InvalidDataset, match=fault):
        extract_to_train(data, tiny_backbone, tmp_path / "cache")


def test_repeats_do_not_count_as_pictures_of_a_class(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_classes(tmp_path / "data", 3)
    for name in ("001.png", "002.png"):
        shutil.copy(data / "red/000.png", data / "red" / name)
    hashed = dataclasses.replace(hash_source(open_source(data)), min_images_per_class=2)
    with pytest.raises(
        InvalidDataset, match=r"class 'red' has 1 training picture\(s\), at least 2 are needed"
    ):
        the_only(extract_each([hashed], tiny_backbone, cache(tmp_path, tiny_backbone), show_progress=False))


def test_equal_files_that_are_no_pictures_are_no_repeats(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_classes(tmp_path / "data", 20)
    for label in ("red", "blue"):
        (data / label / "x.png").write_bytes(b"<html>404")
    skipped = extract_to_train(data, tiny_backbone, tmp_path / "cache").skipped
    assert [line.split(": ")[1][:13] for line in skipped] == ["not a picture"] * 2


# -- pictures that cannot be read --------------------------------------------------------------------


def damage(data: Path) -> None:
    (data / "red/001.png").write_bytes(b"not a picture")
    (data / "blue/000.png").write_bytes((data / "blue/000.png").read_bytes()[:60])


def test_corrupt_pictures_are_left_out_and_listed(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_classes(tmp_path / "data", 4)
    whole = extract(data, tiny_backbone, tmp_path / "cache")
    damage(data)
    features = extract(data, tiny_backbone, tmp_path / "cache", max_corrupt_fraction=0.2)
    assert len(features.label_N) == 10 and features.num_computed == 0
    assert len(features.skipped) == 2
    assert features.skipped[0].startswith(f"{data}/blue/000.png: ")
    assert features.skipped[1].startswith(f"{data}/red/001.png: not a picture in one of the formats")
    kept = [i for i in range(12) if i not in (0, 9)]
    assert torch.equal(features.cls_ND, whole.cls_ND[kept])
    assert torch.equal(features.label_N, whole.label_N[kept])


def test_too_many_corrupt_pictures_are_an_error(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_classes(tmp_path / "data", 4)
    damage(data)
    fault = r"data: 2 of 12 pictures cannot be read, more than the 10% allowed; first: .*/blue/000\.png"
    with pytest.raises(InvalidDataset, match=fault):
        extract(data, tiny_backbone, tmp_path / "cache", max_corrupt_fraction=0.1)


def test_exactly_the_limit_is_tolerated(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_classes(tmp_path / "data", 4)
    damage(data)
    assert len(extract(data, tiny_backbone, tmp_path / "cache", max_corrupt_fraction=2 / 12).skipped) == 2
    data = write_classes(tmp_path / "clean", 2)
    assert extract(data, tiny_backbone, tmp_path / "cache", max_corrupt_fraction=0.0).skipped == ()


def test_not_one_readable_picture_is_an_error(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_classes(tmp_path / "data", 1)
    for file in data.rglob("*.png"):
        file.write_bytes(b"no")
    with pytest.raises(InvalidDataset, match="not one picture can be read"):
        extract(data, tiny_backbone, tmp_path / "cache", max_corrupt_fraction=1.0)


def test_a_missing_file_of_a_manifest_is_listed(tmp_path: Path, tiny_backbone: Backbone) -> None:
    write_classes(tmp_path / "data", 3)
    rows = [f"data/{label}/{i:03d}.png,{label}" for label in ("blue", "red") for i in range(4)]
    (tmp_path / "x.csv").write_text("\n".join(["path,label", *rows]))
    features = extract(tmp_path / "x.csv", tiny_backbone, tmp_path / "cache", max_corrupt_fraction=0.25)
    assert len(features.label_N) == 6
    assert features.skipped[0] == f"{tmp_path}/data/blue/003.png: cannot be opened"


def test_a_path_that_no_file_can_have_is_listed(tmp_path: Path, tiny_backbone: Backbone) -> None:
    write_classes(tmp_path / "data", 3)
    rows = [f"data/{label}/{i:03d}.png,{label}" for label in ("blue", "red") for i in range(3)]
    (tmp_path / "x.csv").write_text("\n".join(["path,label", *rows, "data/\0.png,red"]))
    features = extract(tmp_path / "x.csv", tiny_backbone, tmp_path / "cache", max_corrupt_fraction=0.2)
    assert features.skipped == (f"{tmp_path}/data/\0.png: cannot be opened",)


def test_a_picture_over_the_limits_is_listed(tmp_path: Path, tiny_backbone: Backbone) -> None:
    data = write_classes(tmp_path / "data", 3)
    (data / "red/000.png").write_bytes(encoded(noise(size=(90, 90))))
    features = extract(
        data,
        tiny_backbone,
        tmp_path / "cache",
        max_corrupt_fraction=0.5,
        limits=ImageLimits(max_pixels=64 * 64),
    )
    assert features.skipped == (f"{data}/red/000.png: image is 90×90 pixels, the limit is 4096",)


def test_decoding_runs_ahead_of_the_backbone_and_stays_bounded(
    tmp_path: Path, counting: CountingBackbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a batch is embedded the next two are decoded, and never the whole folder."""
    decoded: list[int] = []
    ahead: list[int] = []

    def counted(*arguments: object) -> torch.Tensor:
        decoded.append(1)
        return load_pixels(*arguments)  # type: ignore[arg-type]

    def embed(pixels_BCHW: torch.Tensor) -> torch.Tensor:
        ahead.append(len(decoded) - sum(sizes) - len(pixels_BCHW))
        sizes.append(len(pixels_BCHW))
        return torch.zeros(len(pixels_BCHW), counting.feature_dim)  # type: ignore[call-overload]

    sizes: list[int] = []
    monkeypatch.setattr("training.embedding.load_pixels", counted)
    monkeypatch.setattr(counting, "embed", embed)
    data = write_classes(tmp_path / "data", 40)
    extract(data, counting, tmp_path / "cache", num_threads=1)  # type: ignore[arg-type]
    assert sizes == [BATCH_SIZE] * 7 + [8]
    assert max(ahead) <= 2 * BATCH_SIZE

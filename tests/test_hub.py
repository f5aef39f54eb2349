"""Pushing to and pulling from a hub: what arrives is what was sent, and is checked like any stranger's file."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from hub_server import Hub, Repository, running_hub

from model_store.backbone import BackboneArtefact
from model_store.errors import HubUnavailable, InvalidBackbone
from model_store.hub import HubRepository, SizeLimits
from model_store.model_card import BEGIN, END, write_card
from model_store.module_file import read_module
from model_store.signatures import Signature, make_private_key, read_private_key, sign

# huggingface_hub hands its HTTP client files in a way that this no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

NAME = "me/tasks"
MakeModule = Callable[..., bytes]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(tmp_path, monkeypatch) as server:
        yield server


def repository(hub: Hub, name: str = NAME, **options: object) -> HubRepository:
    return HubRepository(name, endpoint=hub.endpoint, **options)  # type: ignore[arg-type]


def push(hub: Hub, artefact: BackboneArtefact, *modules: bytes, **options: object) -> str:
    pairs: list[tuple[bytes, list[Signature]]] = [(one, []) for one in modules]
    return repository(hub).push(pairs, artefact.manifest, **options)  # type: ignore[arg-type]


# -- there and back ----------------------------------------------------------------------------------


def test_what_is_pulled_is_what_was_pushed(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    birds, ants = make_module("birds"), make_module("ants", seed=1)
    key = read_private_key(make_private_key())
    signature = sign(hashlib.sha256(birds).hexdigest(), key)
    commit = repository(hub).push(
        [(birds, [signature]), (ants, [])], tiny_artefact.manifest, weights=tiny_artefact.weights
    )
    pulled = repository(hub)
    assert (pulled.commit, pulled.tasks()) == (commit, ["ants", "birds"])
    assert (pulled.module("birds").data, pulled.module("birds").signatures) == (birds, (signature,))
    assert (pulled.module("ants").data, pulled.module("ants").signatures) == (ants, ())
    assert pulled.backbone() == tiny_artefact


def test_a_repository_is_private_unless_said_otherwise(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(hub, tiny_artefact, make_module("birds"))
    repository(hub, "me/open").push([(make_module("birds"), [])], tiny_artefact.manifest, private=False)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert repository(hub, "me/open").tasks() == ["birds"]
    with pytest.raises(HubUnavailable, match=r"repository me/tasks: .*401"):
        repository(hub).tasks()


def test_other_tasks_of_a_repository_stay(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"))
    push(hub, tiny_artefact, make_module("ants", seed=1))
    push(hub, tiny_artefact, make_module("birds", seed=2))
    opened = repository(hub)
    assert opened.tasks() == ["ants", "birds"]
    assert opened.module("birds").data == make_module("birds", seed=2)
    card = hub.repositories[NAME].files["README.md"].decode()
    for task, seed in (("ants", 1), ("birds", 2)):
        assert hashlib.sha256(make_module(task, seed=seed)).hexdigest() in card


def test_an_old_commit_can_be_pulled(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    first = push(hub, tiny_artefact, make_module("birds"))
    push(hub, tiny_artefact, make_module("birds", seed=2))
    assert repository(hub, revision=first).module("birds").data == make_module("birds")
    with pytest.raises(HubUnavailable, match="Invalid rev id"):
        repository(hub, revision="f" * 40).tasks()


def test_a_repository_read_once_does_not_change_under_the_reader(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"))
    opened = repository(hub)
    assert opened.tasks() == ["birds"]
    push(hub, tiny_artefact, make_module("birds", seed=2))
    assert opened.module("birds").data == make_module("birds")


def test_signatures_of_an_earlier_version_do_not_count(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    old = make_module("birds")
    signature = sign(hashlib.sha256(old).hexdigest(), read_private_key(make_private_key()))
    repository(hub).push([(old, [signature])], tiny_artefact.manifest)
    push(hub, tiny_artefact, make_module("birds", seed=2))
    assert repository(hub).module("birds").signatures == ()


# -- faults ------------------------------------------------------------------------------------------


def test_a_file_that_is_not_what_the_hub_says_is_refused_and_not_kept(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"))
    data = bytearray(make_module("birds"))
    data[-1] ^= 1
    hub.tampered["birds.safetensors"] = bytes(data)
    for _ in range(2):
        with pytest.raises(HubUnavailable, match=r"birds\.safetensors .* came with SHA-256"):
            repository(hub).module("birds")
    hub.tampered.clear()
    assert repository(hub).module("birds").data == make_module("birds")


def test_a_damaged_file_in_the_repository_can_be_replaced(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    hub.repositories[NAME] = held = Repository(private=False)
    held.commit({"birds.safetensors": b"damaged"})
    with pytest.raises(HubUnavailable, match=r"birds\.safetensors .* cannot be read"):
        push(hub, tiny_artefact, make_module("ants", seed=1))
    push(hub, tiny_artefact, make_module("birds"))
    assert repository(hub).module("birds").data == make_module("birds")


def test_what_is_too_large_is_not_downloaded(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"), weights=tiny_artefact.weights)
    hub.downloads.clear()
    small = repository(hub, limits=SizeLimits(module=1000, backbone=1000))
    with pytest.raises(HubUnavailable, match=r"birds\.safetensors .* bytes, the limit is 1000"):
        small.module("birds")
    with pytest.raises(HubUnavailable, match=r"weights\.safetensors .* the limit is 1000"):
        small.backbone()
    assert hub.downloads == ["backbone/manifest.json"]


@pytest.mark.parametrize("task", ["absent", "../birds", "backbone/weights", ""])
def test_a_task_that_is_not_there_is_named(
    task: str, hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"), weights=tiny_artefact.weights)
    assert repository(hub).tasks() == ["birds"]
    with pytest.raises(HubUnavailable, match=r"no module file of .*; it has birds"):
        repository(hub).module(task)


def test_a_repository_without_a_backbone_says_so(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"))
    with pytest.raises(HubUnavailable, match=r"me/tasks has no backbone/manifest\.json"):
        repository(hub).backbone()


def test_a_backbone_that_does_not_hold_together_is_refused(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    hub.repositories[NAME] = held = Repository(private=False)
    good = tiny_artefact.manifest
    other = good.model_copy(update={"architecture": "vit_small_patch16_224"})
    noise = b"no safetensors"
    of_noise = good.model_copy(update={"weights_sha256": hashlib.sha256(noise).hexdigest()})
    wider = good.model_copy(update={"feature_dim": 512})
    preprocessing = good.preprocessing.model_copy(update={"std": (0.0, 0.0, 0.0)})
    flat = good.model_copy(update={"preprocessing": preprocessing})
    bad = (
        (b"{}", tiny_artefact.weights, "Field required"),
        (good.model_dump_json().encode(), b"other weights", "backbone weights have SHA-256"),
        (other.model_dump_json().encode(), tiny_artefact.weights, "do not fit 'vit_small_patch16_224'"),
        (of_noise.model_dump_json().encode(), noise, "do not fit 'vit_tiny_patch16_224'"),
        (wider.model_dump_json().encode(), tiny_artefact.weights, "vectors of 192 numbers, .* says 512"),
        (flat.model_dump_json().encode(), tiny_artefact.weights, "what is no number"),
    )
    for manifest, weights, fault in bad:
        held.commit({"backbone/manifest.json": manifest, "backbone/weights.safetensors": weights})
        with pytest.raises(InvalidBackbone, match=fault):
            repository(hub).backbone()


def test_a_commit_of_another_meanwhile_is_not_overwritten(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"))
    hub.before_commit = lambda: hub.repositories[NAME].commit({"other.txt": b"x"})  # type: ignore[assignment]
    with pytest.raises(HubUnavailable, match="412"):
        push(hub, tiny_artefact, make_module("birds", seed=2))
    assert hub.repositories[NAME].files["birds.safetensors"] == make_module("birds")


def test_a_repository_holds_tasks_of_one_backbone(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"))
    preprocessing = tiny_artefact.manifest.preprocessing.model_copy(update={"crop_fraction": 0.5})
    other = tiny_artefact.manifest.model_copy(update={"preprocessing": preprocessing})
    with pytest.raises(HubUnavailable, match="holds birds of another backbone"):
        repository(hub).push([], other, weights=tiny_artefact.weights)
    assert len(hub.repositories[NAME].commits) == 2


def test_without_a_token_nothing_is_pushed(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubUnavailable, match="401"):
        push(hub, tiny_artefact, make_module("birds"))
    assert hub.repositories == {}


def test_a_hub_that_does_not_answer_is_named(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(HubUnavailable, match="repository me/tasks: "):
        HubRepository(NAME, endpoint="http://127.0.0.1:9").tasks()
    with pytest.raises(HubUnavailable, match="repository a/b/c: "):
        repository(hub, "a/b/c").tasks()


# -- the card ----------------------------------------------------------------------------------------


def test_the_card_says_what_the_files_say(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"), licence="cc-by-4.0")
    card = hub.repositories[NAME].files["README.md"].decode()
    loaded = huggingface_hub.ModelCard(card)
    assert (loaded.data.license, loaded.data.library_name) == ("cc-by-4.0", "tosca-serving")
    assert loaded.data.pipeline_tag == "image-classification"
    file = read_module(make_module("birds"))
    for text in (
        file.sha256,
        f"{file.manifest.metrics['accuracy']:.4f}",
        f"{file.manifest.metrics['ece']:.4f}",
        tiny_artefact.manifest.fingerprint,
        "vit\\_tiny\\_patch16\\_224",
        "test split (12 pictures)",
        "birds-0, birds-1, birds-2",
        "tosca pull me/tasks --task birds",
        "tosca serve",
    ):
        assert text in card, text
    assert "tosca pull me/tasks --backbone" not in card
    push(hub, tiny_artefact, weights=tiny_artefact.weights)
    assert "tosca pull me/tasks --backbone" in hub.repositories[NAME].files["README.md"].decode()


def test_without_a_licence_the_card_states_none(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"))
    assert "license" not in hub.repositories[NAME].files["README.md"].decode()


def test_what_people_wrote_around_the_card_stays(
    hub: Hub, tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    push(hub, tiny_artefact, make_module("birds"))
    held = hub.repositories[NAME]
    section = held.files["README.md"].decode()
    held.commit(
        {"README.md": f"---\nlicense: mit\n---\n# Mine\n{section[section.index(BEGIN) :]}After\n".encode()}
    )
    push(hub, tiny_artefact, make_module("ants", seed=1), licence="apache-2.0")
    card = held.files["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n---\n# Mine\n" + BEGIN)
    assert card.endswith(END + "\nAfter\n") and "| ants |" in card and "apache" not in card
    assert card.count(BEGIN) == card.count(END) == 1


def test_labels_cannot_break_out_of_the_card(
    tiny_artefact: BackboneArtefact, make_module: MakeModule
) -> None:
    file = read_module(make_module("birds"))
    labels = ("<script>alert(1)</script>", "a | b", "[x](http://evil)", "`code`", END)
    manifest = file.manifest.model_copy(update={"labels": labels})
    hostile = dataclasses.replace(file, manifest=manifest)
    card = write_card(NAME, {"birds": hostile}, tiny_artefact.manifest, holds_backbone=False, licence=None)
    assert "<script>" not in card and "[x](" not in card and "a | b" not in card and "`code`" not in card
    assert card.count(END) == 1


def test_many_labels_are_cut_short(tiny_artefact: BackboneArtefact, make_module: MakeModule) -> None:
    file = read_module(make_module("birds"))
    manifest = file.manifest.model_copy(update={"labels": tuple(f"label {i}" for i in range(1000))})
    many = dataclasses.replace(file, manifest=manifest)
    card = write_card(NAME, {"birds": many}, tiny_artefact.manifest, holds_backbone=False, licence=None)
    assert "label 99 and 900 more" in card and "label 100" not in card

"""Configs: round trip, fingerprints that follow content, and errors that name the field, the value and what is allowed."""

import json
from typing import Annotated, ClassVar

import pytest
from ray import cloudpickle

from dagr_ray.core.artifact import Artifact
from dagr_ray.core.config import (
    Config,
    ConfigError,
    JsonObject,
    OmitWhenDefault,
    Threshold,
    content_hash,
    digest,
    from_json,
    lookup,
    packed,
    unpacked,
)


class Inner(Config):
    """A config with a threshold, for these tests."""

    size: int = 1
    limit: Annotated[float, Threshold()] = 0.5


class Outer(Config):
    """A config that holds others, for these tests."""

    inner: Inner = Inner()
    several: tuple[Inner, ...] = ()
    name: str = "x"
    since: Annotated[Inner | None, OmitWhenDefault()] = None
    options: Annotated[JsonObject, OmitWhenDefault()] = {}


class Special(Inner):
    """A subclass that stands in a field of its base, for these tests."""

    extra: str = "e"


def test_json_round_trip_keeps_subclasses() -> None:
    value = Outer(inner=Special(extra="z"), several=(Inner(size=3), Special()))
    assert from_json(value.to_json(), Outer) == value
    assert isinstance(from_json(value.to_json(), Config), Outer)


def test_fingerprint_follows_fields_version_and_type() -> None:
    base = Outer()
    assert base.fingerprint() == Outer().fingerprint()
    assert base.fingerprint() != Outer(name="y").fingerprint()
    assert Outer(inner=Special()).fingerprint() != base.fingerprint()
    before = Inner().fingerprint()
    Inner.version = 2
    try:
        assert Inner().fingerprint() != before
    finally:
        Inner.version = 1


def test_a_new_field_is_fingerprinted_unless_it_has_its_default() -> None:
    assert Outer().identity().keys() == {"type", "version", "inner", "several", "name"}
    assert Outer(since=Inner()).identity()["since"] == Inner().fingerprint()
    assert Outer(options={"a": 0}).identity()["options"] == {"a": 0}
    assert from_json(Outer().to_json() | {"options": {}}, Outer).fingerprint() == Outer().fingerprint()


def test_thresholds_do_not_enter_the_scoring_identity() -> None:
    assert Inner(limit=0.1).scoring_identity() == Inner(limit=0.9).scoring_identity()
    assert Inner(limit=0.1).fingerprint() != Inner(limit=0.9).fingerprint()
    assert Inner(size=2).scoring_identity() != Inner(size=3).scoring_identity()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"type": "outer", "nmae": "x"}, ["nmae", "'x'"]),
        ({"type": "outer", "inner": {"type": "special", "size": "big"}}, ["size", "'big'", "integer"]),
        ({"type": "outer", "inner": {"type": "no-such"}}, ["'no-such'", "allowed"]),
        ({"type": "outer", "inner": {"type": "outer"}}, ["'outer'", "allowed"]),
    ],
)
def test_errors_name_field_value_and_allowed(value: dict, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(value, Outer)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_configs_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Outer().name = "z"  # type: ignore[misc]


def test_two_types_cannot_share_a_name() -> None:
    with pytest.raises(TypeError, match="inner"):
        type("Other", (Config,), {"type": "inner", "__module__": "elsewhere"})
    assert lookup("inner", Config) is Inner


def test_content_hash_sees_every_byte_and_name(tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"abc")
    first = content_hash(folder)
    (folder / "a.bin").write_bytes(b"abd")
    second = content_hash(folder)
    (folder / "a.bin").rename(folder / "b.bin")
    third = content_hash(folder)
    (folder / ".hidden").write_bytes(b"x")
    assert len({first, second, third}) == 3
    assert content_hash(folder) == third
    with pytest.raises(ConfigError, match="no file or folder"):
        content_hash(tmp_path / "absent")


def test_digest_is_canonical() -> None:
    assert digest({"a": 1, "b": [1, "é"]}) == digest({"b": [1, "é"], "a": 1})
    assert digest({"a": "1"}) != digest({"a": 1})


class Link(Config):
    """A node that two others share."""

    asked: ClassVar[list[int]] = []
    depth: int = 0
    left: Config | None = None
    right: Config | None = None

    def identity(self) -> dict:
        self.asked.append(self.depth)
        return super().identity()


def test_a_graph_is_fingerprinted_node_by_node() -> None:
    top = Link()
    for depth in range(1, 31):
        top = Link(depth=depth, left=top, right=top)
    Link.asked.clear()
    first = top.fingerprint()
    assert sorted(Link.asked) == list(range(31))
    assert top.fingerprint() == first
    assert len(Link.asked) == 62, "a fingerprint must not be kept: files that it stands for may change"


def test_a_graph_is_written_and_read_node_by_node(tmp_path) -> None:
    top = Link()
    for depth in range(1, 61):
        top = Link(depth=depth, left=top, right=top)
    folder = Artifact(str(tmp_path), "graph")
    folder.write_json("top.json", {"stage": top.to_json()})
    text = (tmp_path / "graph" / "top.json").read_text()
    assert text.count('"type"') == 62 and text.count('"$same"') == 59
    assert json.loads(text)["stage"]["right"] == {"$same": "/stage/left"}
    again = from_json(folder.read_json("top.json")["stage"], Link)
    assert again.fingerprint() == top.fingerprint()
    assert again.left is again.right


def test_free_json_that_looks_like_a_reference_stays_what_it_is() -> None:
    value = {
        "a": {"$same": "/b"},
        "c": {"$same": ["/b"]},
        "b": [{"type": "object", "of": {"$ref": "#/a"}}, {"$same": "/b/0", "more": 1}],
    }
    assert unpacked(json.dumps(packed(value)).encode()) == value


def test_a_config_of_a_jobs_own_file_reaches_the_workers() -> None:
    """Such a class is pickled by value, its validators with it."""
    made: dict = {"__name__": "__main__"}
    exec("from dagr_ray.core.config import Config\nclass OfAJob(Config):\n    inner: Config | None = None", made)
    sent = cloudpickle.dumps(made["OfAJob"](inner=Inner(size=3)))
    assert cloudpickle.loads(sent).inner == Inner(size=3)

"""The behaviour of the reference implementation, recorded in golden/, and the places where this one is stricter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgpack
import pytest

from geventaudit import MsgSchema, RecordSchema, ValidationError
from geventaudit.encoder.encoding import encode
from geventaudit.protocol.decoding import decode
from geventaudit.schema.addresses import canonical_address, service_tree_uuid

GOLDEN = Path(__file__).parent / "golden"
FRAMES = json.loads((GOLDEN / "frames.json").read_text())
VALIDATION = json.loads((GOLDEN / "validation.json").read_text())
ADDRESSES = json.loads((GOLDEN / "addresses.json").read_text())

STRICTER = {"ip_::%eth0", "ip_::ffff:0.0.0.0", "target_list_nil"}


def is_stricter(entry: dict[str, Any]) -> bool:
    return entry["name"] in STRICTER or "(" in entry["name"] or "out_of_range" in entry["name"]


def names(entry: Any) -> str:
    return str(entry.get("name", entry.get("input")))


def unpack(frame: bytes) -> Any:
    return msgpack.unpackb(frame, strict_map_key=False, timestamp=0)


def in_order(value: Any) -> Any:
    """Return *value* in a form that compares the order of keys and the types, and in which NaN equals NaN."""
    if isinstance(value, dict):
        return [(in_order(key), in_order(each)) for key, each in value.items()]
    if isinstance(value, list):
        return [in_order(each) for each in value]
    return type(value).__name__, repr(value)


def input_of(entry: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The service tree id and the record that an entry's frame was made of."""
    body = unpack(bytes.fromhex(entry["frame_hex"]))[1][0][1]
    record = dict(body if entry["record"] is None else entry["record"])
    if entry["has_custom_data"]:
        record["CustomData"] = body["CustomData"]
    return record.pop("env_ikey", None), record


@pytest.mark.parametrize("entry", [e for e in FRAMES if e["valid"] is not None], ids=names)
def test_frame_of_a_record(entry: dict[str, Any]) -> None:
    service_tree_id, record = input_of(entry)
    data = {"Type": entry["type"], "Record": record}
    if not entry["valid"] or is_stricter(entry):
        with pytest.raises(ValidationError):
            MsgSchema().load(data)
        return
    msg = MsgSchema().load(data)
    frame = encode(msg, entry["unix_time"], service_tree_id)
    assert in_order(unpack(frame)) == in_order(unpack(bytes.fromhex(entry["frame_hex"])))


@pytest.mark.parametrize("entry", [e for e in FRAMES if e["valid"] is None], ids=names)
def test_frame_of_heartbeat_and_diagnostic(entry: dict[str, Any]) -> None:
    golden = bytes.fromhex(entry["frame_hex"])
    message, time = decode(golden)
    assert time == entry["unix_time"]
    assert in_order(unpack(encode(message, time))) == in_order(unpack(golden))


@pytest.mark.parametrize("entry", [e for e in FRAMES if e["valid"] and "floats" not in e["name"]], ids=names)
def test_golden_frames_decode_to_the_loaded_message(entry: dict[str, Any]) -> None:
    _, record = input_of(entry)
    loaded = MsgSchema().load({"Type": entry["type"], "Record": record})
    assert decode(bytes.fromhex(entry["frame_hex"])) == (loaded, entry["unix_time"])


# The field that the reference's error text is about, by a word of it.
FIELD_OF_ERROR = [
    ("service tree ID", "env_ikey"),
    ("operation name", "OperationName"),
    ("operation category description", "OperationCategoryDescription"),
    ("operation result description", "OperationResultDescription"),
    ("caller identity is required", "CallerIdentities"),
    ("identity is required for identity type", "CallerIdentities"),
    ("identity is required", "CallerIdentities"),
    ("description is required", "CallerIdentities"),
    ("caller IP address", "CallerIpAddress"),
    ("caller access level", "CallerAccessLevels"),
    ("target resource", "TargetResources"),
]


@pytest.mark.parametrize("entry", VALIDATION, ids=names)
def test_verdict(entry: dict[str, Any]) -> None:
    record = dict(entry["record"])
    errors: dict[str, Any] = {}
    for step in (
        lambda: service_tree_uuid(record.pop("env_ikey")),
        lambda: RecordSchema().load({k: v for k, v in record.items() if k != "env_ikey"}),
    ):
        try:
            step()
        except ValidationError as error:
            errors.update(error.messages)
            assert all(name in str(error) for name in error.messages)
    if is_stricter(entry):
        assert errors
    elif entry["error"]:
        assert next(field for words, field in FIELD_OF_ERROR if words in entry["error"]) in errors
    else:
        assert not errors


def test_every_stricter_entry_is_accepted_by_the_reference_or_broken_anyway() -> None:
    """If the reference ever refuses one of them, it is no longer a difference and belongs off the list."""
    assert {entry["name"] for entry in VALIDATION if not entry["error"]} >= STRICTER


@pytest.mark.parametrize("entry", ADDRESSES, ids=names)
def test_address(entry: dict[str, Any]) -> None:
    if entry["text"] is None:
        with pytest.raises(ValueError, match=r"does not appear to be|has an empty zone"):
            canonical_address(entry["input"])
    else:
        assert canonical_address(entry["input"])[0] == entry["text"]

"""The schema and the examples that are published for editors and other languages."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from geventaudit import MsgSchema
from geventaudit.schema.json_schema import json_schema

DOCS = Path(__file__).parent.parent / "docs"
SCHEMA = DOCS / "schema" / "message.schema.json"
PAGE = (DOCS / "howto" / "editor.md").read_text()
FILES = dict(re.findall(r"<!-- file: (.+?) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL))


def test_the_published_schema_is_current() -> None:
    """If not: geventaudit schema >docs/schema/message.schema.json."""
    assert SCHEMA.read_text() == json.dumps(json_schema(MsgSchema()), indent=2) + "\n"


@pytest.mark.parametrize("name", [each for each in FILES if ".audit." in each])
def test_an_example_follows_the_schema_and_the_rules(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, which the extra [test] brings")
    if name.endswith(".yaml"):
        yaml = pytest.importorskip("yaml", reason="needs PyYAML, which the extra [test] brings")
        message: Any = yaml.safe_load(FILES[name])
    else:
        message = json.loads(FILES[name])
    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    assert [each.message for each in validator.iter_errors(message)] == []
    MsgSchema().load(message)
    message["$schema"] = "./message.schema.json"
    assert not validator.is_valid(message), "as the page says"


def test_the_settings_name_the_schema_and_the_files() -> None:
    settings = json.loads(FILES["settings.json"])
    assert settings["json.schemas"][0]["url"] == f"./{SCHEMA.name}"
    assert settings["yaml.schemas"] == {f"./{SCHEMA.name}": ["*.audit.yaml"]}
    assert settings["json.schemas"][0]["fileMatch"] == ["*.audit.json"]

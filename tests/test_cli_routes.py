"""``geventaudit routes``: the routes of real applications, and the gaps in their records."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from gevent import subprocess

for needed in ("flask", "django", "rest_framework"):
    pytest.importorskip(needed, reason=f"needs {needed}, which the extra [test] brings")
HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"


def routes(folder: Path, *arguments: str) -> tuple[int, str, str]:
    # Not in development mode, which prints warnings of frameworks about their own dependencies.
    command = [sys.executable, "-m", "geventaudit", "routes", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, timeout=120)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def listed(folder: Path, *arguments: str) -> dict[str, Any]:
    """The routes by method and path."""
    status, out, err = routes(folder, *arguments, "--json")
    assert (status, err.replace("on standard error\n", "")) == (0, "")
    return {f"{each['method']} {each['path']}": each for each in json.loads(out)}


@pytest.mark.parametrize("name", ["flask_app", "django_app"])
def test_the_examples_are_complete(name: str) -> None:
    status, out, err = routes(EXAMPLES, name, "--fail-on-unknown")
    assert (status, err) == (0, ""), out
    assert out.splitlines()[-1].endswith("; 0 not complete")
    assert f"{name}.healthz" in out
    assert "unaudited" in out


def test_the_service_of_the_tutorial_is_complete(folder: Path) -> None:
    """Its routes are printed as in the tutorial."""
    tutorial = (HERE.parent / "docs" / "tutorial.md").read_text()
    (folder / "app.py").write_text(tutorial.partition("<!-- file: app.py -->\n```python\n")[2].partition("```")[0])
    _, _, shown = tutorial.partition("geventaudit routes app:app --fail-on-unknown\n```\n\n```text\n")
    assert routes(folder, "app:app", "--fail-on-unknown") == (0, shown.partition("```")[0], "")


FLASK = """
import flask, geventaudit
print("on standard error")
from flask.views import MethodView
from geventaudit import OperationCategory
from geventaudit.integrations.flask import Audit, audited, unaudited
from werkzeug.middleware.dispatcher import DispatcherMiddleware

class Keys(MethodView):
    def get(self): ...
    @audited("RotateKey", category=OperationCategory.KEY_MANAGEMENT, access_level="Owner", target={"Key": "{nam}"})
    def post(self, name): ...

def create_app(**options):
    app = flask.Flask("app", static_folder=None)
    app.add_url_rule("/keys/<name>", view_func=Keys.as_view("keys"))
    app.add_url_rule("/well", view_func=unaudited(lambda: "x"), endpoint="well")
    app.add_url_rule("/hidden/<path:name>", view_func=lambda name: "x", endpoint="hidden")
    if options != {"plain": True}:
        Audit(geventaudit.Client(geventaudit.NoOp), app, exclude=["/hidden/*"], **options)
    return app

app = create_app(access_level="Reader", user=lambda: "ann", caller_access_levels=lambda environ: "Reader")
plain = create_app(plain=True)
outer = create_app()
outer.wsgi_app = DispatcherMiddleware(outer.wsgi_app, {"/v1": plain, "/v2/": app})
fails = lambda: 1 // 0
"""


def test_flask(folder: Path) -> None:
    (folder / "app.py").write_text(FLASK)
    found = listed(folder, "app")
    assert list(found) == [
        "GET /hidden/<path:name>",
        "GET /keys/<name>",
        "POST /keys/<name>",
        "GET /well",
        "* (no route)",
    ]
    assert found["GET /hidden/<path:name>"]["state"] == "excluded"
    assert found["GET /well"]["state"] == "unaudited"
    post = found["POST /keys/<name>"]
    assert (post["operation"], post["type"], post["categories"]) == ("RotateKey", "Create", ["KeyManagement"])
    assert (post["view"], post["access_level"], post["target"]) == ("app.Keys", "Owner", ["Key/{nam}"])
    assert post["unknown"] == []
    assert post["problems"] == ["target names the argument nam, which the route does not have"]
    get = found["GET /keys/<name>"]
    assert (get["operation"], get["access_level"]) == ("GET /keys/<name>", "Reader")
    assert get["unknown"] == found["* (no route)"]["unknown"] == ["OperationCategories"]

    status, out, err = routes(folder, "app:create_app()", "--fail-on-unknown")
    assert (status, err) == (1, "on standard error\n")
    assert "Unknown: CallerIdentities" in out
    assert out.splitlines()[-1] == "5 routes: 3 audited, 1 unaudited, 1 excluded, 0 outside; 3 not complete"
    fields = ("OperationCategories", "OperationAccessLevel", "CallerAccessLevels", "CallerIdentities")
    accepted = [each for field in fields for each in ("--accept", field)]
    status, out, err = routes(folder, "app:create_app()", "--fail-on-unknown", *accepted)
    assert status == 1, "the target's argument"
    assert "Unknown: CallerIdentities (accepted)" in out
    assert out.splitlines()[-1].endswith("1 not complete")


def test_mounts_inside_and_outside_of_the_middleware(folder: Path) -> None:
    (folder / "app.py").write_text(FLASK)
    found = listed(folder, "app:outer")
    assert found["GET /keys/<name>"]["state"] == "audited"
    assert found["GET /v1/keys/<name>"]["state"] == "outside"
    assert "no record is made" in found["GET /v1/keys/<name>"]["problems"][0]
    assert found["GET /v2/keys/<name>"]["operation"] == "GET /v2/keys/<name>"
    assert found["GET /v2/hidden/<path:name>"]["state"] == "excluded", "by its own middleware"


def test_django_views_of_all_kinds() -> None:
    found = listed(HERE, "django_declared_program")
    said = {key: each["operation"] for key, each in found.items() if each["state"] == "audited"}
    assert said["* /keys/<name>"] == "ReadKey"
    assert said["* /orgs/<int:org>/(?P<name>\\w+)$"] == "Nested"
    assert said["* /search/(\\w+)$"] == "Search"
    assert said["GET /mixed"] == "GET /mixed"
    assert said["POST /mixed"] == said["POST /function"] == "RotateKey"
    assert (said["GET /whole"], said["DELETE /whole"]) == ("ManageKeys", "DeleteKey")
    assert found["PATCH /whole"]["state"] == found["* /well"]["state"] == "unaudited"
    assert (said["GET /dispatched"], said["POST /dispatched"]) == ("Dispatched", "Posted")
    assert (said["GET /below"], said["POST /below"], said["GET /above"]) == ("Below", "Below", "Above")
    assert said["POST /api/things/{pk}/rotate/"] == "RotateThing"
    assert not [each for each in found.values() if each["unknown"] or each["problems"]]


def test_django_by_its_settings(folder: Path) -> None:
    for name, text in {
        "__init__": "",
        "settings": "ROOT_URLCONF = 'project.urls'\nWSGI_APPLICATION = 'project.wsgi.application'\nMIDDLEWARE = []\n",
        "urls": "from django.urls import path\nurlpatterns = [path('x/<int:n>', lambda request, n: None)]\n",
        "wsgi": "import geventaudit\nfrom django.core.wsgi import get_wsgi_application\n"
        "from geventaudit.integrations.wsgi import AuditMiddleware\n"
        "application = AuditMiddleware(get_wsgi_application(), geventaudit.Client(geventaudit.NoOp))\n",
        "plain": "from django.core.wsgi import get_wsgi_application\napplication = get_wsgi_application()\n",
        "broken": "ROOT_URLCONF = 'project.nowhere'\nWSGI_APPLICATION = 'project.wsgi.application'\n",
        "bare": "ROOT_URLCONF = 'project.urls'\n",
    }.items():
        (folder / "project").mkdir(exist_ok=True)
        (folder / "project" / f"{name}.py").write_text(text)
    found = listed(folder, "project.settings")["* /x/<int:n>"]
    assert found["operation"] == "<method> /x/<int:n>"
    assert "CallerIdentities" in found["unknown"]
    assert found["problems"] == ["AuditFactsMiddleware is not in MIDDLEWARE: routes and declarations are not read"]
    assert "cannot list the routes of project.broken: ModuleNotFoundError" in routes(folder, "project.broken")[2]
    assert "project.bare has no WSGI_APPLICATION" in routes(folder, "project.bare")[2]


PROBLEMS = {
    "nowhere": "cannot import nowhere: ModuleNotFoundError: No module named 'nowhere'",
    "app.py": "APP must name a module as Python imports it, got the file 'app.py'",
    "app:": "APP must be module:attribute or a module, got 'app:'",
    "app:nothing": "app has no attribute nothing",
    "app:create_app": "create_app is a function, not an application: for a factory, name app:create_app()",
    "app:plain": "app:plain is not audited: write Audit(client, app)",
    "app:fails()": "app:fails() failed: ZeroDivisionError: ",
    "app:Keys": "app:Keys is no Flask or Django application",
    "json": "the module json has neither application nor app nor settings of Django",
    "broken": "broken.py:3)",
    "exits": "cannot import exits: SystemExit: no configuration",
    "wrong": "cannot import wrong: SyntaxError: ",
}


def test_applications_that_cannot_be(folder: Path) -> None:
    (folder / "app.py").write_text(FLASK)
    (folder / "broken.py").write_text("def fail():\n    # of\n    raise RuntimeError('no\\nconfiguration')\nfail()\n")
    (folder / "exits.py").write_text("raise SystemExit('no configuration')\n")
    (folder / "wrong.py").write_text("def x(:\n")
    program = (
        "import sys\nfrom geventaudit.cli import main\n"
        "print([main(['routes', each]) for each in sys.argv[1:]] == [2] * (len(sys.argv) - 1))"
    )
    command = [sys.executable, "-c", program, *PROBLEMS]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=120)
    assert done.stdout == b"True\n"
    lines = [line for line in done.stderr.decode().splitlines() if line != "on standard error"]
    for line, (app, problem) in zip(lines, PROBLEMS.items(), strict=True):
        assert line.startswith("geventaudit: "), app
        assert problem in line, app

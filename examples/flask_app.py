"""A Flask application with an audit trail of its requests.

pip install 'geventaudit[flask]' 'gunicorn[gevent]'
gunicorn -k gevent -w 4 --chdir examples flask_app:app

AUDIT_SOCKET names the agent's socket; without it, the usual one of mdsd is used. The hooks in gunicorn.conf.py let a
worker deliver its records before it ends. List the routes and their records, and check that no field is Unknown:

geventaudit routes --fail-on-unknown flask_app:app
"""

import os
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, abort, g, request

import geventaudit
from geventaudit import AuditType, OperationCategory
from geventaudit.integrations.flask import Audit, audited, unaudited

ROLES = {"ann": ["Administrator", "Contributor"], "bob": ["Reader"]}

client = geventaudit.Client(lambda: geventaudit.DomainSocket(os.environ.get("AUDIT_SOCKET") or None), stamp=True)
app = Flask(__name__)
Audit(
    client,
    app,
    user=lambda: g.get("user"),
    # Defaults for views that declare nothing else:
    category=OperationCategory.RESOURCE_MANAGEMENT,
    access_level="Contributor",
    caller_access_levels=lambda environ: ROLES.get(g.get("user"), ["Anonymous"]),
    trusted_proxies=["127.0.0.1"],  # nginx on this host names the caller
)


@app.before_request
def sign_in() -> None:
    g.user = request.args.get("user")  # an example: a real service authenticates the user


@app.get("/things/<int:number>")
@audited("ReadThing", audit_type=AuditType.DATA_PLANE, access_level="Reader", target={"Thing": "{number}"})
def get_thing(number: int) -> dict[str, Any]:
    if number < 1:
        abort(404)
    return {"number": number}


@app.post("/things")
@audited("CreateThing")
def create_thing() -> tuple[dict[str, Any], int]:
    return {"number": 1}, 201


@app.delete("/things/<int:number>")
@audited("DeleteThing", access_level="Administrator", target={"Thing": "{number}"})
def delete_thing(number: int) -> tuple[str, int]:
    return "", 204


@app.get("/export")
def export() -> Response:
    def lines() -> Iterator[str]:
        for number in range(1000):
            yield f"thing {number}\n"

    return Response(lines(), mimetype="text/plain")


@app.get("/broken")
def broken() -> str:
    raise RuntimeError("this view does not work")


@app.get("/healthz")
@unaudited
def healthz() -> str:
    return "well"

"""The page: its template, style and script, Bokeh's script and the data, as one text that asks for nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from qdq_surgery.text.view import Line, Table, View

__all__ = ["render"]

_ASSETS = "assets"


def render(values: Mapping[str, Any], data: Mapping[str, Any], library: str) -> str:
    """The whole page.

    Args:
        values: What the template shows; every text in it is escaped.
        data: What the script draws from.
        library: Bokeh's script.
    """
    scripts = [_own_script(library), _own_script(_asset("page.js"))]
    environment = Environment(
        loader=PackageLoader("qdq_surgery.html_report", _ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests.update(line=_is(Line), table=_is(Table), view=_is(View))
    environment.filters["style_classes"] = _style_classes
    return environment.get_template("page.html.j2").render(
        **values,
        policy=_policy(scripts),
        style=Markup(_asset("page.css")),
        data=htmlsafe_json_dumps(data, separators=(",", ":"), allow_nan=False),  # it ends no script element
        scripts=[Markup(script) for script in scripts],
    )


def _asset(name: str) -> str:
    return (files("qdq_surgery.html_report") / _ASSETS / name).read_text(encoding="utf-8")


def _own_script(text: str) -> str:
    """A script that ends where it is meant to end: in its strings, a slash may have a backslash before it."""
    return text.replace("\r\n", "\n").replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is loaded from anywhere, and no script runs but these, whatever the rest of the page says."""
    hashes = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts)
    own = " ".join(f"'sha256-{each}'" for each in hashes)
    locked = "base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; script-src {own}; style-src 'unsafe-inline'; img-src data:; {locked}"


def _is(kind: type) -> Any:
    return lambda value: isinstance(value, kind)


def _style_classes(style: str) -> str:
    return " ".join(f"s-{word}" for word in style.split())

"""The generated files are fresh, and the example settings are complete and load to the defaults."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from deploy.tools.dashboard import panels
from deploy.tools.generate import generated_files
from pawl_server.config import Config, load_config, settings
from tests.unit.deploy.manifests import DEPLOY, ROOT

EXAMPLE = DEPLOY / "pawl.example.toml"


@pytest.mark.parametrize("path", generated_files(), ids=lambda path: path.name)
def test_generated_files_are_fresh(path: Path) -> None:
    written, wanted = path.read_text(encoding="utf-8"), generated_files()[path]
    assert written == wanted, f"run `python -m deploy.tools.generate` ({path.relative_to(ROOT)} is stale)"


def test_the_example_has_every_setting_with_a_comment() -> None:
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    written = {(section, name) for section, items in tomllib.loads("\n".join(lines)).items() for name in items}
    assert written == {(s.section, s.name) for s in settings() if not s.secret}
    for number, line in enumerate(lines):
        if line and not line.startswith(("#", "[")):
            assert lines[number - 1].startswith("# "), f"{line}: no comment above"
    for setting in settings():
        if setting.secret:
            assert setting.variable in EXAMPLE.read_text()


def test_the_example_loads_to_the_defaults() -> None:
    assert load_config(file=EXAMPLE, environment={}) == Config()


def test_a_change_in_the_example_counts(tmp_path: Path) -> None:
    text = EXAMPLE.read_text(encoding="utf-8").replace("max_running = 64", "max_running = 7")
    path = tmp_path / "pawl.toml"
    path.write_text(text)
    assert load_config(file=path, environment={}).engine.max_running == 7


def test_the_dashboard_is_whole() -> None:
    board = json.loads((DEPLOY / "grafana" / "pawl.json").read_text())
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    graphs = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len(graphs) == sum(len(row) for row in panels().values())
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert max(x for x, _ in cells) < 24
        taken |= cells
    titles = {panel["title"] for panel in graphs}
    assert len(titles) == len(graphs)
    for panel in graphs:
        assert panel["targets"], panel["title"]
        assert all(target["expr"].count("(") == target["expr"].count(")") for target in panel["targets"])

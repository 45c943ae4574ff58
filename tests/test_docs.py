"""Every snippet in the README runs, in the order in which it stands; every file that the documents name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_readme_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) == 10
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "validation_accuracy" in printed
    assert "all derivatives agree" in printed
    assert (tmp_path / "net.safetensors").exists()


def test_architecture_names_what_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    listing = text.split("```")[1]
    folder = ROOT / "chainrule"
    for line in listing.splitlines():
        names = re.findall(r"[\w/]+\.py|\w+/", line.split("  ")[0] if not line.startswith("  ") else line)
        for name in names:
            found = [p for p in (folder / name, *folder.glob(f"*/{name}")) if p.exists()]
            assert found, f"ARCHITECTURE.md names {name}, which is not there"
    listed = set(re.findall(r"\w+\.py", listing))
    there = {
        p.name
        for p in folder.rglob("*.py")
        if not p.name.startswith("__") and p.parent.name not in ("data", "explain", "examples")
    }
    assert there <= listed, f"ARCHITECTURE.md does not name {sorted(there - listed)}"

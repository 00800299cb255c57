"""Rank r imports only from lower ranks, or from its own folder."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
RANKS = (
    ("errors", "text", "interrupt"),
    ("checks",),
    ("config", "rng", "images", "files", "paths", "choices"),
    ("diffusion", "networks", "data"),
    ("storage", "cluster"),
    ("training", "samplers", "evaluation"),
    ("builders", "serving", "convert", "callbacks"),
    ("experiment",),
    ("app",),
)
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
KNOWS_NO = {
    "diffusion": ("keras", "ml_collections"),
    "samplers": ("keras", "ml_collections"),
    "networks": ("ml_collections",),
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            yield from (
                (f"{node.module}.{alias.name}" for alias in node.names) if node.module == "ddpm_tf" else [node.module]
            )


def test_imports_point_down():
    for path in (ROOT / "ddpm_tf").rglob("*.py"):
        room = path.relative_to(ROOT / "ddpm_tf").parts[0].removesuffix(".py")
        for name in imports(path):
            parts = name.split(".")
            if parts[0] in (
                "configs",
                "tests",
                "benchmarks",
                "tools",
                "run_train",
                "run_sample",
                "run_export",
                "run_convert",
            ):
                raise AssertionError(f"{path} imports {name}")
            if parts[0] == "ddpm_tf" and len(parts) > 1 and parts[1] in RANK and parts[1] != room:
                assert RANK[parts[1]] < RANK[room], f"{path}: {room} (rank {RANK[room]}) imports {name}"
            assert parts[0] not in KNOWS_NO.get(room, ()), f"{path} imports {name}"


def test_every_room_has_a_rank():
    rooms = {
        p.name.removesuffix(".py")
        for p in (ROOT / "ddpm_tf").iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert rooms - {"__init__"} <= RANK.keys()

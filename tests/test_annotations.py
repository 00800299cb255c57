"""Every function and method of the package says what it takes and what it returns."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "ddpm_tf"


def unannotated(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
        bare = [a.arg for a in arguments if a and a.annotation is None and a.arg not in ("self", "cls")]
        if bare or node.returns is None:
            yield f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}: {', '.join(bare) or 'what it returns'}"


def test_every_function_is_annotated():
    assert [problem for path in sorted(PACKAGE.rglob("*.py")) for problem in unannotated(path)] == []

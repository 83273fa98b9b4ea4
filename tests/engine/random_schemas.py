"""Random JSON Schemas of everyday keywords, some of which cannot be enforced or satisfied."""

from __future__ import annotations

import json
import random
from typing import Any

__all__ = ["random_schema"]

SIMPLE = ["string", "pattern", "integer", "number", "boolean", "null", "enum", "const"]
NESTED = ["array", "object", "anyOf", "oneOf", "allOf", "ref", "types", "anything", "not"]


def random_schema(seed: int) -> dict[str, Any]:
    """The schema of one seed."""
    r = random.Random(seed)
    schema = _schema(r, 0)
    return {**schema, "$defs": {"t": _schema(r, 2)}} if "$ref" in json.dumps(schema) else schema


def _schema(r: random.Random, depth: int) -> dict[str, Any]:
    def some(**keywords: Any) -> dict[str, Any]:
        return {name: value for name, value in keywords.items() if value is not None and r.random() < 0.6}

    def several(low: int, high: int) -> list[dict[str, Any]]:
        return [_schema(r, depth + 1) for _ in range(r.randint(low, high))]

    match r.choice(SIMPLE + NESTED if depth < 3 else SIMPLE):
        case "string":
            form = r.choice([None, "date", "email", "uuid", "zzz"])
            return {"type": "string", **some(minLength=r.randint(0, 4), maxLength=r.randint(3, 9), format=form)}
        case "pattern":
            pattern = r.choice(["^a+$", "b", "[0-9]{2,3}", "^(x|yy)", "z$", r"^\d{3}-\w$"])
            return {"type": "string", "pattern": pattern, **some(minLength=r.randint(0, 3))}
        case "integer":
            limits = some(minimum=r.randint(-50, 5), maximum=r.randint(5, 500), exclusiveMinimum=r.choice([None, -3]))
            return {"type": "integer", **limits, **some(multipleOf=r.choice([None, 2, 7, 10]))}
        case "number":
            limits = some(minimum=r.choice([-1.5, 0, 0.25]), exclusiveMaximum=r.choice([2, 3.75, 1e3]))
            return {"type": "number", **limits, **some(multipleOf=r.choice([None, 0.5, 0.01]))}
        case "enum":
            values = [1, "a", None, True, 2.5, {"a": 1}, [1], 'é"\\']
            return {"enum": r.sample(values, r.randint(1, 4)), **some(type=r.choice(["string", "integer", None]))}
        case "const":
            return {"const": r.choice([0, "x", {"q": [None]}, [], False])}
        case "array":
            sizes = some(minItems=r.randint(0, 2), maxItems=r.randint(1, 4), uniqueItems=r.choice([None] * 5 + [True]))
            return {"type": "array", **some(items=_schema(r, depth + 1), prefixItems=several(1, 2)), **sizes}
        case "object":
            names = r.sample(["a", "b", "c d", "é", "x_1"], r.randint(0, 4))
            return {
                "type": "object",
                **some(
                    properties={name: _schema(r, depth + 1) for name in names},
                    required=r.sample(["a", "b", "zz", "é"], r.randint(0, 2)),
                    additionalProperties=r.choice([False, True, None, {"type": "integer"}]),
                    minProperties=r.choice([None, 1, 2]),
                    maxProperties=r.choice([None, 3]),
                    patternProperties=r.choice([None, {"^x_": _schema(r, depth + 1)}]),
                ),
            }
        case "anyOf":
            return {"anyOf": several(1, 3), **some(type=r.choice(["object", "string", None]))}
        case "oneOf":
            return {"oneOf": several(2, 2)}
        case "allOf":
            return {"allOf": several(1, 2)}
        case "ref":
            return {"$ref": "#/$defs/t"}
        case "types":
            kinds = r.sample(["string", "integer", "null", "boolean", "array"], 2)
            return {"type": kinds, **some(maxLength=3, minimum=1, maxItems=2)}
        case "anything":
            return r.choice([{}, {"title": "t"}])
        case "not":
            return {"not": {"type": "null"}}
        case simple:
            return {"type": simple}

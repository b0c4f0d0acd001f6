"""`rljob crd`: the CustomResourceDefinition of the RLJob, as YAML for `kubectl apply -f -`."""

from __future__ import annotations

from typing import Any, TextIO

import yaml

from rljob_api.crd import custom_resource_definition

_HEADER = "# Generated from the models in api/rljob_api by `make generate`; never edited.\n"


class _Dumper(yaml.SafeDumper):
    """Plain YAML: no aliases, texts of several lines as blocks."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def crd_yaml() -> str:
    """The text of crds/rljob.yaml."""
    body = yaml.dump(custom_resource_definition(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
    return _HEADER + body


def print_crd(out: TextIO) -> int:
    """Write the definition; returns the exit code."""
    out.write(crd_yaml())
    return 0

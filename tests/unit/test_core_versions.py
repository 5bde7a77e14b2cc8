"""What differs between releases of Megatron-Core is met in one file."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from megatron_kosmosg.parallel import core_versions

PACKAGE = Path(core_versions.__file__).parents[1]


def test_no_other_file_asks_for_the_version_of_the_core():
    asks = re.compile(
        r"megatron\.core\.(__version__|package_info)|is_(mcore|megatron)\w*version"
        r"|metadata\.version\("
    )
    # In a message.
    shown = {"platform.py", "cpu_shim_selftest.py", "kernels.py"}
    shown = {f"parallel/{name}" for name in shown} | {"cli/main.py", "cli/doctor.py"}
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if asks.search(path.read_text(encoding="utf-8"))
    }
    assert found == shown


def test_rates_are_adopted_at_any_depth_and_nothing_else():
    group = {"max_lr": 1.0, "min_lr": 0.5, "wd_mult": 2.0}
    saved = {
        "optimizer": {"param_groups": [dict(group), dict(group)]},
        1: {"param_groups": [group]},
    }
    core_versions.adopt_learning_rates(saved, 3.0, 0.0)
    expected = {"max_lr": 3.0, "min_lr": 0.0, "wd_mult": 2.0}
    assert saved == {
        "optimizer": {"param_groups": [expected, expected]},
        1: {"param_groups": [expected]},
    }


def test_advice_to_programmers_is_hidden_and_other_warnings_are_not(caplog):
    core_versions.quieten()
    for module, start in core_versions._ADVICE.items():
        logger = logging.getLogger(f"megatron.core.{module}")
        with caplog.at_level(logging.WARNING, logger.name):
            logger.warning(f"{start} and more")
            logger.warning(f"lost in {module}")
    assert [record.message for record in caplog.records] == [
        f"lost in {module}" for module in core_versions._ADVICE
    ]

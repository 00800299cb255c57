"""Tables of choices: a setting is one field, one entry and one keyword, under one default."""

import pytest

from ddpm_tf import builders
from ddpm_tf import config as config_lib
from ddpm_tf.choices import Choice, choose
from ddpm_tf.errors import InputError
from tests.conftest import tiny_config

FIELDS = {field.path: field for field in config_lib.FIELDS}
SETTINGS = [(p, entry, s) for p, table in builders.TABLES.items() for entry, c in table.items() for s in c.settings]


@pytest.mark.parametrize(("path", "entry", "setting"), SETTINGS)
def test_a_setting_has_a_field_with_its_default(path, entry, setting):
    field = FIELDS[builders.setting_field(path, entry, setting)]
    assert builders.TABLES[path][entry].defaults()[setting] == field.default


@pytest.mark.parametrize("path", builders.TABLES)
def test_a_setting_that_the_chosen_entry_does_not_have_is_refused_by_its_field(path):
    table = builders.TABLES[path]
    for chosen in table:
        owned = {builders.setting_field(path, chosen, s) for s in table[chosen].settings}
        for entry, choice in table.items():
            for setting in choice.settings:
                name = builders.setting_field(path, entry, setting)
                config = tiny_config()
                config_lib.put(config, path, chosen)
                default = FIELDS[name].default
                others = {
                    str: lambda v: f"{v}x",
                    float: lambda v: v + 0.01,
                    int: lambda v: v + 1,
                    bool: lambda v: not v,
                }
                config_lib.put(config, name, default if name in owned else others[type(default)](default))
                if name in owned:
                    assert not builders.foreign_settings(config)
                    continue
                with pytest.raises(InputError, match=f"{name}=.*: {path}={chosen} has no such setting; leave it at"):
                    builders.check(config)


def test_a_config_reaches_the_entrys_keywords():
    config = tiny_config()
    config.diffusion.schedule, config.diffusion.cosine_s = "cosine", 0.1
    config.train.loss_weight, config.train.min_snr_gamma = "min_snr", 2.0
    config.network.theta, config.sample.eta = 100.0, 0.5
    builders.check(config)
    diffusion = builders.build_diffusion(config)
    default = tiny_config()
    default.diffusion.schedule = "cosine"
    assert diffusion.schedule.betas[0] != builders.build_diffusion(default).schedule.betas[0]
    assert builders.build_network(config, diffusion).theta == 100.0
    assert builders.build_sampler(config, diffusion).eta == 0.5


def test_choose_binds_the_own_settings_and_refuses_the_others():
    def build(x, *, a=1, b=2):
        return x, a, b

    table = {"one": Choice(build, ("a", "b")), "two": Choice(lambda x: x)}
    assert choose("thing", "one", table, {"b": 5})(0) == (0, 1, 5)
    assert choose("thing", "two", table, {"a": 1})(7) == 7  # at its default
    for name, settings, message in (
        ("three", {}, "Unknown thing 'three'; expected one of"),
        ("two", {"a": 3}, "a is a setting of the thing one; two has no such setting, and a=3 was given"),
        ("one", {"c": 3}, "Unknown setting of a thing 'c'"),
    ):
        with pytest.raises(InputError, match=message):
            choose("thing", name, table, settings)

"""All bad inputs."""

from robustness import config_cases, data_cases, option_cases, saved_cases

CASES = [*config_cases.CASES, *data_cases.CASES, *saved_cases.CASES, *option_cases.CASES]

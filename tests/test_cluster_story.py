"""A search on a cluster whose nodes and head come and go: every trial is there, once, and continues where it was."""

import pytest
from cluster_story import RESOURCES, story

pytestmark = [pytest.mark.slow, pytest.mark.whole, pytest.mark.timeout(2400)]


@pytest.mark.parametrize("executor", RESOURCES)
def test_no_trial_is_lost_or_trained_twice_while_nodes_and_the_head_come_and_go(tmp_path, executor):
    story(tmp_path, executor)

"""Two trainings into one bundle: one works, the other says who does."""

import pytest

from tlbatch.commands.fitting import _work_folder
from tlbatch.commands.train import _alone
from tlbatch.errors import LeaseHeldError
from tlbatch.storage.resolve import resolve


def test_the_second_training_says_who_is_at_work_and_leaves_it_alone(tmp_path):
    bundle = resolve(str(tmp_path / "models" / "bundle"))
    with _alone(bundle):
        with pytest.raises(LeaseHeldError, match=r"Run training-.* has been working on this bundle since"), _alone(bundle):
            pytest.fail("it began")
        assert (tmp_path / "models" / "bundle" / ".training" / "lease.json").exists()
    assert not (tmp_path / "models").exists()


def test_what_a_killed_training_left_is_removed_and_the_bundle_stays(tmp_path):
    bundle = resolve(str(tmp_path / "bundle"))
    bundle.join(".training", "base", "model.keras").write(b"half")
    bundle.join("bundle.json").write(b"{}")
    with _alone(bundle), _work_folder(bundle) as work:
        assert work.names() == ["lease.json"]
        work.join("features", "x").write(b"x")
    assert bundle.names() == ["bundle.json"]

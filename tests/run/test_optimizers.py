from memfit.run.optimizers import warmup_then_cosine


def test_the_learning_rate_rises_and_falls():
    shares = [warmup_then_cosine(done, steps=60) for done in range(60)]
    peak = shares.index(max(shares))
    assert shares[peak] == 1
    assert peak == 5
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert 0 < shares[-1] < 0.01
    assert warmup_then_cosine(0, steps=1) == 1

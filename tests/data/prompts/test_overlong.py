from brewjax.data.prompts.overlong import Overlong, OverlongLog


def test_each_surface_counts_its_own_and_the_count_starts_anew():
    log = OverlongLog()
    for prefix, noun in (("jobs/", "job 1"), ("jobs/", "job 1"), ("posts/", "post 1")):
        log.within(prefix).add("likes", "truncated", Overlong(1, noun, "text", 9, 5))
    counts = log.take()
    assert log.lines() == []
    log.within("jobs/").add("likes", "truncated", Overlong(2, "job 2", "text", 7, 5))
    log.merge(counts)
    assert [line.split(",")[0] for line in log.lines()] == [
        "jobs/likes: 2 texts too long were truncated",
        "posts/likes: 1 text too long was truncated",
    ]

from muxjax.outputs import Completion, Delta, TokenLogprobs


def test_deltas_are_joined_to_a_completion():
    logprobs = [TokenLogprobs(-float(i), []) for i in range(3)]
    prompt_logprobs = [TokenLogprobs(-1.0, [])]
    deltas = [
        Delta("ab", [1, 2], logprobs[:2], None, prompt_logprobs),
        Delta("", [3], logprobs[2:], "stop", None, 3),
    ]
    completion = Completion.from_deltas(deltas, (7, 8), 1)
    assert completion == Completion(
        text="ab",
        token_ids=[1, 2, 3],
        finish_reason="stop",
        logprobs=logprobs,
        prompt_token_ids=[7, 8],
        stop_reason=3,
        prompt_logprobs=prompt_logprobs,
    )
    assert (completion.num_prompt_tokens, completion.num_cached_tokens) == (2, 1)


def test_logprobs_are_none_if_no_delta_has_them():
    completion = Completion.from_deltas([Delta("", [], None, "cancelled")], [1], 0)
    assert (completion.logprobs, completion.prompt_logprobs, completion.stop_reason) == (
        None,
        None,
        None,
    )

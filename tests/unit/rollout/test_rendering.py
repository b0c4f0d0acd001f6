from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.tokenizers import CHATML, character_tokenizer, chatml_tokenizer
from transformers import AutoTokenizer

from rljob_api.errors import EnvironmentFailure, RljobError
from rljob_runtime.environments.base import Message
from rljob_runtime.rollout.rendering import Renderer


@pytest.fixture(scope="module")
def chatml_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatml_tokenizer(tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="module")
def chatml(chatml_dir: Path) -> Renderer:
    return Renderer(chatml_dir)


@pytest.fixture(scope="module")
def characters(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(character_tokenizer(tmp_path_factory.mktemp("characters")))


@pytest.fixture(scope="module")
def reference(chatml_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(chatml_dir))


def full(tokenizer: Any, messages: list[Message]) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


text = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=text, rounds=st.lists(st.tuples(text, text, st.booleans()), min_size=1, max_size=4))
def test_growing_a_context_gives_the_tokens_of_rendering_it_whole(
    chatml: Renderer, reference: Any, prompt: str, rounds: list[tuple[str, str, bool]]
) -> None:
    messages = [Message("system", "be brief"), Message("user", prompt)]
    grown = list(chatml.first(messages))
    for answer, observation, sampled_its_end in rounds:
        turn = [*chatml._encode(answer), *([chatml.turn_end_token_id] if sampled_its_end else [])]
        grown += [*turn, *chatml.after_turn(observation, turn[-1] == chatml.turn_end_token_id)]
        messages += [Message("assistant", answer), Message("user", observation)]
    assert grown == full(reference, messages)


def test_a_sampled_end_of_turn_is_not_repeated(chatml: Renderer) -> None:
    ended, cut = chatml.after_turn("go on", True), chatml.after_turn("go on", False)
    assert cut == (chatml.turn_end_token_id, *ended)
    assert ended[0] != chatml.turn_end_token_id


def test_turns_stop_at_the_end_token_and_at_the_templates_end_of_turn(chatml: Renderer, characters: Renderer) -> None:
    assert len(chatml.stop_token_ids) == 2 and chatml.turn_end_token_id in chatml.stop_token_ids
    assert characters.stop_token_ids == (1,)


def test_decoding_leaves_special_tokens_out(chatml: Renderer, characters: Renderer) -> None:
    assert chatml.decode((*chatml._encode("höhe  x\n"), chatml.turn_end_token_id)) == "höhe  x\n"
    assert characters.decode((4, 5, 1)) == "12"
    assert characters.decode(()) == ""


def test_without_a_template_contents_are_joined_behind_the_begin_token(characters: Renderer) -> None:
    assert characters.first((Message("system", "1"), Message("user", "23="))) == (2, 4, 5, 6, 13)
    for ended in (True, False):
        assert characters.after_turn("40=", ended) == (7, 3, 13)
    assert characters.after_turn("", True) == ()


@pytest.mark.parametrize(("content", "shown"), [("3a=", "'a'"), ("3 =", "' '"), ("x\ny", r"'\\n' 'x' 'y'")])
def test_a_character_without_a_token_is_an_error_that_names_it(characters: Renderer, content: str, shown: str) -> None:
    with pytest.raises(EnvironmentFailure, match=f"no token for {shown} in"):
        characters.first((Message("user", content),))
    with pytest.raises(EnvironmentFailure, match=r"model\.random\.alphabet"):
        characters.after_turn(content, True)


def test_a_tokenizer_without_an_unknown_token_does_not_drop_characters_in_silence(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": 0, "1": 1, "2": 2}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path)
    renderer = Renderer(tmp_path)
    assert renderer.first((Message("user", "12"),)) == (1, 2)
    with pytest.raises(EnvironmentFailure, match="no token for '3'"):
        renderer.first((Message("user", "132"),))


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RljobError, match="no tokenizer could be read"):
        Renderer(tmp_path)


def test_a_template_that_refuses_the_roles_is_an_environment_failure(tmp_path: Path) -> None:
    directory = chatml_tokenizer(tmp_path)
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    for path in directory.glob("*"):
        if path.name == "chat_template.jinja":
            path.write_text(template + CHATML)
    with pytest.raises(EnvironmentFailure, match="refuses messages of the roles system, user"):
        Renderer(directory).first((Message("system", "x"), Message("user", "y")))

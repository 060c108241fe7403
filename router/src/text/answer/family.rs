//! The families of tool markup, and which of them a chat template teaches.

use super::{
    Opening, ToolParser, Types, deepseek, glm, harmony, hermes, kimi, llama, minimax, qwen_xml, tagged,
};

/// A form of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Hermes, Qwen2.5, Qwen3: JSON between `<tool_call>` tags.
    Hermes,
    /// Llama 3: bare JSON, or Python after `<|python_tag|>`.
    Llama,
    /// DeepSeek V3, V3.1 and R1.
    DeepSeek,
    /// Kimi K2.
    Kimi,
    /// MiniMax M2: `<invoke>` with one `<parameter>` each.
    MiniMax,
    /// GLM 4.5: `<arg_key>` and `<arg_value>`.
    Glm,
    /// Qwen3-Coder: `<function=..>` with `<parameter=..>`.
    QwenXml,
    /// gpt-oss: messages in channels.
    Harmony,
}

impl Family {
    /// All, for settings.
    pub const ALL: [Family; 8] = [
        Family::Hermes,
        Family::Llama,
        Family::DeepSeek,
        Family::Kimi,
        Family::MiniMax,
        Family::Glm,
        Family::QwenXml,
        Family::Harmony,
    ];

    /// The name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Family::Hermes => "hermes",
            Family::Llama => "llama3",
            Family::DeepSeek => "deepseek",
            Family::Kimi => "kimi_k2",
            Family::MiniMax => "minimax_m2",
            Family::Glm => "glm45",
            Family::QwenXml => "qwen3_coder",
            Family::Harmony => "openai",
        }
    }

    /// From a name in settings.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }

    /// The family whose marks a chat template writes.
    pub fn of_template(source: &str) -> Option<Self> {
        let has = |mark: &str| source.contains(mark);
        match () {
            () if has("<|channel|>") && has("<|message|>") => Some(Family::Harmony),
            () if has("<minimax:tool_call>") => Some(Family::MiniMax),
            () if has("<｜tool▁call▁begin｜>") => Some(Family::DeepSeek),
            () if has("<|tool_call_begin|>") => Some(Family::Kimi),
            () if has("<arg_key>") => Some(Family::Glm),
            () if has("<function=") && has("<parameter=") => Some(Family::QwenXml),
            () if has("<tool_call>") && has("arguments") && !has("<function=") => Some(Family::Hermes),
            () if has("<|start_header_id|>") && has("\"parameters\"") => Some(Family::Llama),
            () => None,
        }
    }

    /// Tokens of its markup, which must be text even where the vocabulary calls them special.
    pub fn marks(self) -> &'static [&'static str] {
        match self {
            Family::Hermes => &["<tool_call>", "</tool_call>"],
            Family::Llama => &["<|python_tag|>"],
            Family::DeepSeek => &[
                "<｜tool▁calls▁begin｜>",
                "<｜tool▁calls▁end｜>",
                "<｜tool▁call▁begin｜>",
                "<｜tool▁call▁end｜>",
                "<｜tool▁sep｜>",
            ],
            Family::Kimi => &[
                "<|tool_calls_section_begin|>",
                "<|tool_calls_section_end|>",
                "<|tool_call_begin|>",
                "<|tool_call_end|>",
                "<|tool_call_argument_begin|>",
            ],
            Family::MiniMax => &["<minimax:tool_call>", "</minimax:tool_call>"],
            Family::Glm => {
                &["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"]
            }
            Family::QwenXml => &["<tool_call>", "</tool_call>"],
            Family::Harmony => &harmony::MARKS,
        }
    }

    /// Tokens that end an answer, whatever a model's files list.
    pub fn ends(self) -> &'static [&'static str] {
        if self == Family::Harmony { &harmony::ENDS } else { &[] }
    }

    /// Reads one answer.
    pub(super) fn parser(self, types: &Types) -> Box<dyn ToolParser> {
        let table = |table| Box::new(tagged::Tagged::new(table, types.clone()));
        match self {
            Family::Hermes => Box::new(hermes::Hermes::default()),
            Family::Llama => Box::new(llama::Llama::default()),
            Family::DeepSeek => Box::new(deepseek::DeepSeek::default()),
            Family::Kimi => Box::new(kimi::Kimi::default()),
            Family::MiniMax => table(&minimax::TABLE),
            Family::Glm => table(&glm::TABLE),
            Family::QwenXml => table(&qwen_xml::TABLE),
            Family::Harmony => Box::new(harmony::Harmony::new(Some(types.clone()), Opening::ByModel)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_tell_their_family() {
        for (source, family) in [
            ("<tool_call>\\n{\"name\": .., \"arguments\": ..}</tool_call>", Some(Family::Hermes)),
            ("<minimax:tool_call> arguments", Some(Family::MiniMax)),
            ("<tool_call><function=f><parameter=a> arguments", Some(Family::QwenXml)),
            ("<tool_call>f<arg_key> arguments", Some(Family::Glm)),
            ("<｜tool▁call▁begin｜>", Some(Family::DeepSeek)),
            ("<|tool_call_begin|>", Some(Family::Kimi)),
            ("<|start_header_id|> {\"name\": .., \"parameters\": ..}", Some(Family::Llama)),
            ("<|start|>assistant<|channel|>final<|message|>", Some(Family::Harmony)),
            ("<|im_start|>", None),
        ] {
            assert_eq!(Family::of_template(source), family, "{source}");
        }
        assert!(Family::ALL.into_iter().all(|family| Family::named(family.name()) == Some(family)));
    }
}

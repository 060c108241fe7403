//! Text and ids equal Hugging Face's, for the families' tokenizers and chat templates: a wrong space in a prompt makes a
//! model worse without any error. `golden_text.json` was written by transformers.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use router::text::answer::Family;
use router::text::{Beginning, Conversation, Detokenizer, ModelText};
use serde::Deserialize;
use serde_json::{Map, Value};
use vocab::Vocab;

const FAMILIES: [&str; 6] = ["llama", "qwen3", "deepseek_v3", "minimax_m2", "kimi_k2", "gpt_oss"];

/// The same tokenizers and templates in other files, and the family that they must equal: GGUF files without tensors, and a
/// tiktoken.model.
const OTHERS: [(&str, &str); 3] =
    [("llama_gguf/model.gguf", "llama"), ("qwen3_gguf", "qwen3"), ("kimi_k2_tiktoken", "kimi_k2")];

#[derive(Deserialize)]
struct Golden {
    encode: Vec<Encoding>,
    chats: Vec<Chat>,
}

#[derive(Deserialize)]
struct Encoding {
    text: String,
    ids: Vec<u32>,
    ids_special: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct Chat {
    messages: Vec<Value>,
    #[serde(default)]
    tools: Vec<Value>,
    add_generation_prompt: bool,
    #[serde(default)]
    variables: Map<String, Value>,
    rendered: String,
    ids: Vec<u32>,
}

fn fixture(family: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "tests", "fixtures", family].iter().collect()
}

fn load(family: &str) -> (ModelText, Golden) {
    load_as(family, family)
}

/// The text of the model `name`, and what the family must give.
fn load_as(name: &str, family: &str) -> (ModelText, Golden) {
    let golden = std::fs::read(fixture(family).join("golden_text.json")).expect("a fixture");
    let text = ModelText::load(&fixture(name)).expect("a model's text");
    (text, serde_json::from_slice(&golden).expect("a golden file"))
}

/// All fixtures, each with its family.
fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    FAMILIES.into_iter().map(|family| (family, family)).chain(OTHERS)
}

#[test]
fn encodings_equal_hugging_faces() {
    for (family, of) in all() {
        let (text, golden) = load_as(family, of);
        for case in golden.encode {
            let encode = |special| text.tokenizer.encode(&case.text, special).expect("encodable");
            assert_eq!(encode(false), case.ids, "{family}: {:?}", case.text);
            assert_eq!(encode(true), case.ids_special, "{family}: {:?} with special tokens", case.text);
            assert_eq!(text.tokenizer.decode(&case.ids, true), case.decoded, "{family}: {:?}", case.text);
        }
    }
}

#[test]
fn chats_equal_hugging_faces() {
    for (family, of) in all() {
        let (text, golden) = load_as(family, of);
        for chat in golden.chats {
            let conversation = Conversation {
                messages: chat.messages,
                tools: chat.tools,
                add_generation_prompt: chat.add_generation_prompt,
                continues: false,
                variables: chat.variables,
            };
            let rendered =
                text.templates.render(conversation, SystemTime::UNIX_EPOCH, 1 << 20).expect("rendered");
            assert_eq!(rendered, chat.rendered, "{family}");
            assert_eq!(text.tokenizer.encode(&rendered, false).expect("encodable"), chat.ids, "{family}");
        }
    }
}

/// Router and nodes compare vocabularies: one must be the same from whatever file it is read.
#[test]
fn vocabularies_are_the_same_from_every_file() {
    for (name, family) in OTHERS {
        let identity = |name: &str| Vocab::read(&fixture(name)).expect("a vocabulary").identity();
        assert_eq!(identity(name), identity(family), "{name}");
    }
}

/// However ids fall, and most random sequences are no valid UTF-8, the increments are the library's decoding of the whole.
#[test]
fn increments_equal_the_whole() {
    for family in FAMILIES {
        let (text, _) = load(family);
        let path = fixture(family).join("tokenizer.json");
        let reference = tokenizers::Tokenizer::from_file(path).expect("a tokenizer");
        let ids = prop::collection::vec(0..text.tokenizer.pieces().len() as u32 + 3, 0..40);
        let property = |(ids, skip): (Vec<u32>, bool)| {
            let mut detokenizer =
                Detokenizer::new(Arc::clone(text.tokenizer.pieces()), skip, Beginning::Text);
            let mut whole = String::new();
            ids.iter().for_each(|&id| detokenizer.push(id, &mut whole));
            detokenizer.finish(&mut whole);
            prop_assert_eq!(whole, reference.decode(&ids, skip).expect("decodable"));
            Ok(())
        };
        TestRunner::new(ProptestConfig {
            cases: 500,
            failure_persistence: None,
            ..ProptestConfig::default()
        })
        .run(&(ids, any::<bool>()), property)
        .unwrap_or_else(|error| panic!("{family}: {error}"));
    }
}

#[test]
fn templates_tell_the_form_of_calls_and_who_reasons() {
    for (name, family, reasons) in [
        ("llama", Family::Llama, false),
        ("qwen3", Family::Hermes, true),
        ("deepseek_v3", Family::DeepSeek, true),
        ("minimax_m2", Family::MiniMax, true),
        ("gpt_oss", Family::Harmony, false),
    ] {
        let text = load(name).0;
        assert_eq!((text.family(), text.reasons()), (Some(family), reasons), "{name}");
    }
}

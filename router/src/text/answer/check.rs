//! For tests of this folder: an answer is read whole, by characters, and cut at every two places; the parts must agree.

use super::{AnswerReader, Family, Part, Reading, Types, append};

pub fn text(text: &str) -> Part {
    Part::Text(text.into())
}

pub fn reasoning(text: &str) -> Part {
    Part::Reasoning(text.into())
}

/// A complete call.
pub fn call(name: &str, arguments: &str) -> Vec<Part> {
    vec![Part::Call { id: None, name: name.into() }, Part::Arguments(arguments.into()), Part::CallEnd]
}

/// The parts of an answer with tools and without reasoning.
pub fn called(family: Family, types: &Types, answer: &str) -> Vec<Part> {
    let reading = Reading { tools: Some((family, types.clone())), reasoning: None, family: Some(family) };
    parts(&reading, answer)
}

/// The parts of an answer, neighbours joined.
pub fn parts(reading: &Reading, answer: &str) -> Vec<Part> {
    let whole = run(reading, &[answer]);
    let characters: Vec<&str> = answer.split_inclusive(|_| true).collect();
    assert_eq!(run(reading, &characters), whole, "by characters: {answer:?}");
    let cuts: Vec<usize> = answer.char_indices().map(|(at, _)| at).collect();
    for (i, &first) in cuts.iter().enumerate() {
        for &second in &cuts[i..] {
            let pieces = [&answer[..first], &answer[first..second], &answer[second..]];
            assert_eq!(run(reading, &pieces), whole, "{pieces:?}");
        }
    }
    whole
}

fn run(reading: &Reading, pieces: &[&str]) -> Vec<Part> {
    let mut reader: AnswerReader = reading.reader().expect("something to read");
    let mut parts = Vec::new();
    for piece in pieces {
        // Parts leave after every piece, as they do on a stream.
        let mut new = Vec::new();
        reader.push(piece, &mut new);
        new.into_iter().for_each(|part| append(&mut parts, part));
    }
    let mut new = Vec::new();
    reader.finish(&mut new);
    new.into_iter().for_each(|part| append(&mut parts, part));
    parts
}

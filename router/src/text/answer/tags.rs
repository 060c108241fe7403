//! Text that waits for a tag: what is certainly none is given out, the beginning of one is held back.

/// What was found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// Text without any of the tags; more may come.
    Text(String),
    /// The text before a tag, and which it was. The tag is gone.
    Tag(String, usize),
}

/// Text not read yet.
#[derive(Debug, Default)]
pub struct Buffer(String);

impl Buffer {
    /// More text.
    pub fn push(&mut self, text: &str) {
        self.0.push_str(text);
    }

    /// Up to the first of `tags`. `Found::Text` ends the reading until more text comes.
    pub fn until(&mut self, tags: &[&str]) -> Found {
        let first = tags
            .iter()
            .enumerate()
            .filter_map(|(which, tag)| self.0.find(tag).map(|at| (at, which)))
            .min_by_key(|&(at, which)| (at, std::cmp::Reverse(tags[which].len())));
        match first {
            Some((at, which)) => {
                let before = self.0[..at].to_string();
                self.0.drain(..at + tags[which].len());
                Found::Tag(before, which)
            }
            None => {
                let held = tags.iter().map(|tag| begun(&self.0, tag)).max().unwrap_or(0);
                Found::Text(self.0.drain(..self.0.len() - held).collect())
            }
        }
    }

    /// What is left.
    pub fn rest(&mut self) -> String {
        std::mem::take(&mut self.0)
    }
}

/// Bytes at the end of `text` that begin `tag`.
fn begun(text: &str, tag: &str) -> usize {
    let ends = |n: &usize| tag.is_char_boundary(*n) && text.ends_with(&tag[..*n]);
    (1..tag.len()).rev().find(ends).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_a_tag_is_held_back() {
        let mut buffer = Buffer::default();
        buffer.push("a <");
        assert_eq!(buffer.until(&["<b>", "</b>"]), Found::Text("a ".into()));
        buffer.push("/");
        assert_eq!(buffer.until(&["<b>", "</b>"]), Found::Text(String::new()));
        buffer.push("b>c<d");
        assert_eq!(buffer.until(&["<b>", "</b>"]), Found::Tag(String::new(), 1));
        assert_eq!(buffer.until(&["<b>", "</b>"]), Found::Text("c<d".into()));
        buffer.push("<｜t");
        assert_eq!(buffer.until(&["<｜tool｜>"]), Found::Text(String::new()));
        assert_eq!(buffer.rest(), "<｜t");
    }
}

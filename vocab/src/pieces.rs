//! From the text that a tokenizer file shows for a token to the bytes that the token stands for.

/// How a tokenizer file writes bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// GPT-2: every byte is one printable character.
    ByteLevel,
    /// SentencePiece: `▁` is a space, and `<0x0A>` a byte where `byte_fallback`.
    SentencePiece {
        /// Whether `<0xNN>` tokens are bytes.
        byte_fallback: bool,
    },
}

impl Style {
    /// The bytes of `piece`.
    pub(crate) fn bytes(self, piece: &str) -> Vec<u8> {
        match self {
            // A token with any other character is literal text, as in Hugging Face's decoder.
            Style::ByteLevel => {
                piece.chars().map(byte_level).collect::<Option<Vec<u8>>>().unwrap_or_else(|| piece.into())
            }
            Style::SentencePiece { byte_fallback } => match byte_token(piece) {
                Some(byte) if byte_fallback => vec![byte],
                _ => piece.replace('\u{2581}', " ").into_bytes(),
            },
        }
    }
}

/// The byte that a character of byte-level BPE stands for: printable Latin-1 characters stand for themselves, and the
/// other 68 bytes, in ascending order, are U+0100 and following.
fn byte_level(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8), // [0x00, 0x20]
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8), // [0x7f, 0xa0]
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The character that byte-level BPE writes for a byte.
pub(crate) fn byte_char(byte: u8) -> char {
    let code = match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u32::from(byte),
        0x00..=0x20 => u32::from(byte) + 0x100,
        0x7f..=0xa0 => u32::from(byte) - 0x7f + 0x121,
        0xad => 0x143,
    };
    char::from_u32(code).unwrap_or_default()
}

/// `<0x0A>`: the byte 10.
fn byte_token(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2 && !digits.starts_with('+')).then(|| u8::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_level_alphabet_is_a_bijection() {
        let mut seen = [0; 256];
        (0..=0x200).filter_map(char::from_u32).filter_map(byte_level).for_each(|b| seen[b as usize] += 1);
        assert!(seen.iter().all(|count| *count == 1), "{seen:?}");
        assert!((0..=255).all(|byte| byte_level(byte_char(byte)) == Some(byte)));
    }

    #[test]
    fn byte_level_pieces() {
        assert_eq!(Style::ByteLevel.bytes("Ġhello"), b" hello");
        assert_eq!(Style::ByteLevel.bytes("Ċ"), b"\n");
        // U+1F600 in two tokens: neither is UTF-8 on its own.
        assert_eq!(Style::ByteLevel.bytes("ðŁĺ"), [0xf0, 0x9f, 0x98]);
        assert_eq!(Style::ByteLevel.bytes("Ģ"), [0x80]);
        assert_eq!(Style::ByteLevel.bytes("<｜end｜>"), "<｜end｜>".as_bytes());
    }

    #[test]
    fn sentencepiece_pieces() {
        let style = Style::SentencePiece { byte_fallback: true };
        assert_eq!(style.bytes("▁the"), b" the");
        assert_eq!(style.bytes("<0x0A>"), b"\n");
        assert_eq!(style.bytes("<0xé>"), "<0xé>".as_bytes());
        assert_eq!(style.bytes("<0x+1>"), b"<0x+1>");
        assert_eq!(Style::SentencePiece { byte_fallback: false }.bytes("<0x0A>"), b"<0x0A>");
    }
}

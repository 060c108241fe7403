//! Writes GGUF files for tests, right ones and, by setting the fields apart, wrong ones.

/// Numbers of value types in a file.
pub const U32: u32 = 4;
pub const TEXT: u32 = 8;
pub const LIST: u32 = 9;

/// A file to be.
#[derive(Clone)]
pub struct Writer {
    pub version: u32,
    pub keys: Vec<(String, Vec<u8>)>,
    pub tensors: Vec<Line>,
    pub alignment: usize,
    /// Counts to claim instead of the true ones.
    pub claims: (Option<u64>, Option<u64>),
}

/// A tensor to be.
#[derive(Clone)]
pub struct Line {
    pub name: String,
    /// Innermost first, as in the file.
    pub dims: Vec<u64>,
    pub kind: u32,
    /// `None`: behind the tensor before.
    pub offset: Option<u64>,
    pub bytes: Vec<u8>,
}

impl Writer {
    pub fn new(architecture: &str) -> Writer {
        Writer { version: 3, keys: Vec::new(), tensors: Vec::new(), alignment: 32, claims: (None, None) }
            .text("general.architecture", architecture)
    }

    pub fn key(mut self, key: &str, kind: u32, value: impl AsRef<[u8]>) -> Writer {
        self.keys.push((key.into(), [&kind.to_le_bytes(), value.as_ref()].concat()));
        self
    }

    pub fn text(self, key: &str, value: &str) -> Writer {
        self.key(key, TEXT, text(value))
    }

    pub fn count(self, key: &str, value: u32) -> Writer {
        self.key(key, U32, value.to_le_bytes())
    }

    pub fn number(self, key: &str, value: f32) -> Writer {
        self.key(key, 6, value.to_le_bytes())
    }

    pub fn flag(self, key: &str, value: bool) -> Writer {
        self.key(key, 7, [u8::from(value)])
    }

    pub fn texts(self, key: &str, values: &[&str]) -> Writer {
        let items: Vec<u8> = values.iter().flat_map(|value| text(value)).collect();
        self.key(key, LIST, [&TEXT.to_le_bytes()[..], &(values.len() as u64).to_le_bytes(), &items].concat())
    }

    pub fn counts(self, key: &str, values: &[u32]) -> Writer {
        let items: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.key(key, LIST, [&U32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes(), &items].concat())
    }

    pub fn numbers(self, key: &str, values: &[f32]) -> Writer {
        let items: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.key(key, LIST, [&6u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes(), &items].concat())
    }

    /// An F32 tensor of `shape` (outermost first), all of it 1.
    pub fn ones(self, name: &str, shape: &[u64]) -> Writer {
        let count: u64 = shape.iter().product();
        let bytes: Vec<u8> = (0..count).flat_map(|_| 1f32.to_le_bytes()).collect();
        self.tensor(name, shape, 0, bytes)
    }

    pub fn tensor(mut self, name: &str, shape: &[u64], kind: u32, bytes: Vec<u8>) -> Writer {
        let dims = shape.iter().rev().copied().collect();
        self.tensors.push(Line { name: name.into(), dims, kind, offset: None, bytes });
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend(self.claims.0.unwrap_or(self.tensors.len() as u64).to_le_bytes());
        out.extend(self.claims.1.unwrap_or(self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            out.extend(text(key));
            out.extend(value);
        }
        let mut data = Vec::new();
        for line in &self.tensors {
            out.extend(text(&line.name));
            out.extend((line.dims.len() as u32).to_le_bytes());
            line.dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(line.kind.to_le_bytes());
            data.resize(usize::next_multiple_of(data.len(), self.alignment), 0);
            out.extend(line.offset.unwrap_or(data.len() as u64).to_le_bytes());
            data.extend(&line.bytes);
        }
        out.resize(out.len().next_multiple_of(self.alignment), 0);
        out.extend(data);
        out
    }
}

/// A text as the format writes it.
pub fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

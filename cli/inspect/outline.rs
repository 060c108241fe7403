//! A stand-in for a model that is elsewhere: a temporary directory with its small files, and of each weight file the header
//! followed by a hole of the right length. Whoever opens it sees the model's tables; the weights are never fetched.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use hub::{Bytes, Peek, Weights};

use crate::system;

/// Longest small file that is taken whole; indexes of the largest models are some MB.
const SMALL_BYTES_MAX: u64 = 64 << 20;
/// Longest header, as in the safetensors library.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Read of a safetensors file before its header's length is known.
const FIRST_BYTES: u64 = 64 << 10;
/// Read of a GGUF file, whose header has no length: vocabularies take up to some MB.
const GGUF_BYTES: u64 = 32 << 20;
/// Files whose headers are read at once.
const AT_ONCE: usize = 8;
/// What is told of a model beside its weights.
const SMALL: [&str; 3] = ["config.json", "generation_config.json", "hf_quant_config.json"];

/// The stand-in; gone when dropped.
pub struct Outline {
    dir: PathBuf,
    path: PathBuf,
}

/// Reads what `peek` has of the model, or of its quantisation `quant`.
pub fn of(peek: &Peek<'_>, quant: Option<&str>) -> Result<Outline> {
    let names = peek.names();
    let weights = hub::weights(&names, quant).map_err(|reason| anyhow!("{reason}"))?;
    let dir =
        std::env::temp_dir().join(format!("baton-inspect-{}-{}", system::user_id(), std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let mut outline = Outline { path: dir.clone(), dir };
    for name in SMALL.iter().filter(|name| names.contains(name)) {
        outline.small(peek, name)?;
    }
    let (files, first) = match weights {
        Weights::Single(file) => (vec![file], FIRST_BYTES),
        Weights::Indexed(index) => {
            let json = outline.small(peek, &index)?;
            (hub::index_files(&json).map_err(|reason| anyhow!("{index}: {reason}"))?, FIRST_BYTES)
        }
        Weights::Gguf(files) => {
            outline.path = outline.place(&files[0]);
            (files, GGUF_BYTES)
        }
    };
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            outline.header(peek, file, first).with_context(|| file.clone())?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE.min(files.len())).map(|_| scope.spawn(work)).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a thread panicked"))))
    })?;
    Ok(outline)
}

impl Outline {
    /// The stand-in's directory, or the first GGUF file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An error as if the files were where the user thinks they are.
    pub fn without_place(&self, error: anyhow::Error) -> anyhow::Error {
        anyhow!(format!("{error:#}").replace(&format!("{}/", self.dir.display()), ""))
    }

    fn place(&self, file: &str) -> PathBuf {
        // One level: the parts of a model lie beside each other.
        self.dir.join(file.rsplit('/').next().unwrap_or(file))
    }

    fn small(&self, peek: &Peek<'_>, file: &str) -> Result<Vec<u8>> {
        let bytes = peek.read(file, 0, SMALL_BYTES_MAX + 1)?;
        ensure!(bytes.len() as u64 <= SMALL_BYTES_MAX, "{file} has more than {}", Bytes(SMALL_BYTES_MAX));
        let path = self.place(file);
        fs::write(&path, &bytes).with_context(|| path.display().to_string())?;
        Ok(bytes)
    }

    fn header(&self, peek: &Peek<'_>, file: &str, first: u64) -> Result<()> {
        let len = peek.len(file)?;
        let mut bytes = peek.read(file, 0, first.min(len))?;
        if let (Some(prefix), true) = (bytes.first_chunk::<8>(), file.ends_with(".safetensors")) {
            let header = u64::from_le_bytes(*prefix);
            ensure!(header <= HEADER_BYTES_MAX, "not a safetensors file: a header of {header} bytes");
            let end = (8 + header).min(len);
            let have = bytes.len() as u64;
            if end > have {
                bytes.extend(peek.read(file, have, end)?);
            }
        }
        let path = self.place(file);
        let write = || -> std::io::Result<()> {
            let mut out = File::create(&path)?;
            out.write_all(&bytes)?;
            out.set_len(len)
        };
        write().with_context(|| path.display().to_string())
    }
}

impl Drop for Outline {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

//! Requests with their grammars compiled, off the async threads. The vocabulary is read when the first grammar comes: most
//! clusters never see one. Called by the services of both roles.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use engine::Request;
use grammar::{Compiler, GrammarError};
use proto::v1;
use tokio::sync::Semaphore;
use tonic::Status;
use vocab::Vocab;

use crate::convert;

/// Grammars that are compiled at once: the rest wait, for the engine needs the cores.
const COMPILING_MAX: usize = 2;

/// Makes requests of messages.
#[derive(Clone, Debug)]
pub struct Grammars(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    model: PathBuf,
    compiler: OnceLock<Result<Compiler, GrammarError>>,
    places: Arc<Semaphore>,
}

impl Grammars {
    /// `model`: the directory with the tokenizer.
    pub fn new(model: PathBuf) -> Self {
        let places = Arc::new(Semaphore::new(COMPILING_MAX));
        Self(Arc::new(Inner { model, compiler: OnceLock::new(), places }))
    }

    /// Checks and takes over a sequence. A grammar that does not compile here would not elsewhere either: it is invalid.
    pub async fn request(&self, sequence: Option<v1::Sequence>) -> Result<Request, Status> {
        let text = sequence.as_ref().map(|sequence| sequence.grammar.clone()).unwrap_or_default();
        let mut request = convert::request(sequence)?;
        if text.is_empty() {
            return Ok(request);
        }
        let inner = Arc::clone(&self.0);
        // The semaphore is never closed.
        let place = Arc::clone(&inner.places).acquire_owned().await.ok();
        let work = move || {
            let _place = place;
            inner.compiler().and_then(|compiler| compiler.compile(&text))
        };
        let compiled = tokio::task::spawn_blocking(work).await;
        let compiled = compiled.map_err(|_| Status::internal("compiling a grammar failed"))?;
        request.grammar = Some(compiled.map_err(|error| Status::invalid_argument(error.to_string()))?);
        Ok(request)
    }
}

impl Inner {
    fn compiler(&self) -> Result<&Compiler, GrammarError> {
        let read = || {
            let vocab = Vocab::read(&self.model);
            let vocab = vocab.map_err(|error| GrammarError::Vocabulary(error.to_string()))?;
            Compiler::new(Arc::new(vocab))
        };
        self.compiler.get_or_init(read).as_ref().map_err(Clone::clone)
    }
}

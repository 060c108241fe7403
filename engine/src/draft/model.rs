//! A small model of the same vocabulary beside the large one: whole, on a device and in a store of its own, on the leader alone.
//! What it holds of a sequence is what both have in common: a guess that was wrong is written over. What it held of a job that has
//! ended is kept while there is room, for the next one that begins alike: a conversation is not read anew at each turn.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use backend::draw::Rule;
use backend::{
    Backend, BackendError, Batch, Draw, Drawn, KvError, KvStore, Out, Output, Pending, SeqId, Step,
};
use models::Model;

use super::{Ask, Drafted, Drafter};
use crate::error::EngineError;
use crate::rates::Rates;

/// Rows that are read while nobody knows how long they take.
const ROWS_UNKNOWN: usize = 64;

/// Rows that are read by the slowest machine.
const ROWS_MIN: usize = 16;

/// Rows of a sequence that are no reading: what the last steps drew.
const ROWS_DRAWN: usize = 4;

/// A draft model on its device.
pub struct DraftModel<B: Backend> {
    backend: B,
    model: Model<B>,
    kv: B::Kv,
    /// By job.
    sequences: BTreeMap<u64, Held>,
    /// Of jobs that have ended, the oldest first.
    kept: VecDeque<Held>,
    /// Sequences are never numbered twice.
    next_seq: u64,
    rates: Rates,
}

/// A sequence in the draft's store.
struct Held {
    seq: SeqId,
    salt: Vec<u8>,
    /// Whose cache is there: the sequence's, then perhaps guesses.
    tokens: Vec<u32>,
    /// Of them, surely the sequence's.
    sure: usize,
}

/// A guess that grows by a token with every step.
struct Growing {
    /// Which ask.
    index: usize,
    /// The row that its first token is drawn from.
    row: u32,
    seq: SeqId,
    most: usize,
    tokens: Vec<u32>,
}

/// A step under way: which guesses it makes longer.
struct Running<B: Backend> {
    pending: Box<dyn Pending<B::Hidden>>,
    rows: usize,
    grows: usize,
    /// Its time, on a device that computes as it is called.
    took: Option<Duration>,
}

impl<B: Backend> DraftModel<B> {
    /// Makes its store, of `kv_bytes`.
    pub fn new(mut backend: B, model: Model<B>, kv_bytes: u64) -> Result<Self, EngineError> {
        let kv = backend
            .kv(model.kv_spec(), kv_bytes)
            .map_err(|reason| EngineError::KvMemory { bytes: kv_bytes, reason })?;
        Ok(DraftModel {
            backend,
            model,
            kv,
            sequences: BTreeMap::new(),
            kept: VecDeque::new(),
            next_seq: 1,
            rates: Rates::default(),
        })
    }

    /// Room for `ask`, and how many of its tokens are held. `None`: it has none, or is too long.
    fn hold(&mut self, ask: &Ask<'_>) -> Result<Option<usize>, EngineError> {
        let len = ask.tokens.len();
        if len >= self.model.max_context() {
            return Ok(None);
        }
        let tokens = (len + ask.most).min(self.model.max_context()) as u32;
        if !self.sequences.contains_key(&ask.job) {
            let held = match self.alike(ask) {
                Some(held) => held,
                None => {
                    let seq = SeqId(self.next_seq);
                    if !self.with_room(|kv| kv.open(seq, tokens))? {
                        return Ok(None);
                    }
                    self.next_seq += 1;
                    Held { seq, salt: ask.salt.into(), tokens: Vec::new(), sure: 0 }
                }
            };
            self.sequences.insert(ask.job, held);
        }
        let Some(seq) = self.sequences.get(&ask.job).map(|held| held.seq) else { return Ok(None) };
        if !self.with_room(|kv| kv.grow(seq, tokens))? {
            return Ok(None);
        }
        let Some(held) = self.sequences.get_mut(&ask.job) else { return Ok(None) };
        let guessed = held.tokens[held.sure..].iter().zip(&ask.tokens[held.sure..]);
        held.sure += guessed.take_while(|(held, token)| held == token).count();
        // The last row is computed in any case: the next token is drawn from it.
        held.sure = held.sure.min(len - 1);
        held.tokens.truncate(held.sure);
        Ok(Some(held.sure))
    }

    /// Of what was kept, that which begins most like `ask`, if that is most of it: else another may go on from there.
    fn alike(&mut self, ask: &Ask<'_>) -> Option<Held> {
        let alike = |(at, held): (usize, &Held)| {
            let pairs = held.tokens.iter().zip(ask.tokens);
            let same = pairs.take_while(|(held, token)| held == token).count();
            (held.salt == ask.salt && 2 * same > held.tokens.len()).then_some((same, at))
        };
        let (_, at) = self.kept.iter().enumerate().filter_map(alike).max()?;
        let held = self.kept.remove(at)?;
        Some(Held { sure: 0, ..held })
    }

    /// Whether there is room for `op`, if need be for what was kept, the oldest first.
    fn with_room(&mut self, op: impl Fn(&mut B::Kv) -> Result<(), KvError>) -> Result<bool, EngineError> {
        loop {
            match op(&mut self.kv) {
                Ok(()) => return Ok(true),
                Err(KvError::Full { .. }) => {}
                Err(error) => return Err(BackendError::from(error).into()),
            }
            let Some(oldest) = self.kept.pop_front() else { return Ok(false) };
            self.kv.close(oldest.seq).map_err(BackendError::from)?;
        }
    }

    /// Begins a step that draws a token for each of `draws`, by these rules from these rows.
    fn begin(&mut self, batch: &Batch, draws: &[(u32, Rule)]) -> Running<B> {
        let begun = Instant::now();
        let mut step = self.backend.step(&mut self.kv, batch);
        let pending = if draws.is_empty() {
            self.model.fill(&mut step, &mut |_, _| {});
            step.submit(Out::Nothing)
        } else {
            let rows: Vec<u32> = draws.iter().map(|(row, _)| *row).collect();
            let logits = self.model.forward(&mut step, &rows, &mut |_, _| {});
            step.submit(Out::Draw(logits, draws.iter().map(|(_, rule)| Draw::Token(*rule)).collect()))
        };
        let took = pending.ready().then(|| begun.elapsed());
        Running { pending, rows: batch.rows(), grows: draws.len(), took }
    }

    fn draft(&mut self, asks: &[Ask<'_>], within: Duration) -> Result<Drafted, EngineError> {
        let mut drafted = Drafted { guesses: vec![None; asks.len()], steps: Vec::new() };
        let rows = self.rates.prompt_rows_within(within).unwrap_or(ROWS_UNKNOWN);
        let mut budget = rows.clamp(ROWS_MIN, self.backend.caps().chunk_tokens.max(ROWS_MIN));
        let mut batch = Batch::default();
        let mut growing: Vec<Growing> = Vec::new();
        for (index, ask) in asks.iter().enumerate() {
            let Some(start) = self.hold(ask)? else {
                drafted.guesses[index] = Some(Vec::new());
                continue;
            };
            let end = ask.tokens.len() - usize::from(ask.most == 0);
            let mut rows = end - start;
            if rows > ROWS_DRAWN {
                rows = rows.min(budget);
                budget -= rows;
            }
            let ids = &ask.tokens[start..start + rows];
            let known = |id: &u32| (*id as usize) < self.model.vocab_size();
            if start == end || !ids.iter().all(known) {
                drafted.guesses[index] = Some(Vec::new());
                continue;
            }
            if rows == 0 {
                continue;
            }
            let Some(held) = self.sequences.get_mut(&ask.job) else { continue };
            held.tokens.extend_from_slice(ids);
            held.sure = held.tokens.len();
            batch.push(held.seq, start as u32, ids);
            if held.sure < ask.tokens.len() {
                continue;
            }
            let most = ask.most.min(self.model.max_context() - held.sure);
            let row = batch.rows() as u32 - 1;
            growing.push(Growing { index, row, seq: held.seq, most, tokens: Vec::new() });
        }
        if batch.runs.is_empty() {
            return Ok(drafted);
        }
        // The longest first: those that grow are always the first ones.
        growing.sort_by_key(|guess| std::cmp::Reverse(guess.most));
        let draws: Vec<(u32, Rule)> =
            growing.iter().map(|guess| (guess.row, asks[guess.index].rule)).collect();

        let reads = batch.rows();
        let mut begun = Instant::now();
        let mut running = Some(self.begin(&batch, &draws));
        let mut depth = 0;
        while let Some(Running { pending, rows, grows, took }) = running.take() {
            depth += 1;
            // The next step takes its tokens from this one, wherever it runs.
            let longer = growing.iter().take_while(|guess| guess.most > depth).count();
            if longer > 0 {
                let mut batch = Batch::default();
                for (row, guess) in growing[..longer].iter().enumerate() {
                    let start = asks[guess.index].tokens.len() + depth - 1;
                    batch.push_drawn(guess.seq, start as u32, row as u32);
                }
                let rule = |guess: &Growing| {
                    let rule = asks[guess.index].rule;
                    Rule { position: rule.position + depth as u64, ..rule }
                };
                let draws: Vec<(u32, Rule)> = (0..).zip(growing[..longer].iter().map(rule)).collect();
                running = Some(self.begin(&batch, &draws));
            }
            let output = pending.wait()?;
            let waited = std::mem::replace(&mut begun, Instant::now()).elapsed();
            let took = took.unwrap_or(waited);
            drafted.steps.push((rows, took));
            if depth == 1 && reads > ROWS_UNKNOWN / 2 {
                self.rates.step(reads, 0, took);
            }
            if let Output::Drawn(drawn) = output {
                for (guess, drawn) in growing[..grows].iter_mut().zip(drawn) {
                    let Drawn::Token(id) = drawn else {
                        return Err(BackendError::Device(format!("the draft model drew {drawn:?}")).into());
                    };
                    guess.tokens.push(id);
                }
            }
        }
        for Growing { index, tokens, .. } in growing {
            if let Some((_, computed)) = tokens.split_last()
                && let Some(held) = self.sequences.get_mut(&asks[index].job)
            {
                held.tokens.extend_from_slice(computed);
            }
            drafted.guesses[index] = Some(tokens);
        }
        Ok(drafted)
    }
}

impl<B: Backend> Drafter for DraftModel<B> {
    fn guess(&mut self, asks: &[Ask<'_>], within: Duration) -> Result<Drafted, EngineError> {
        let drafted = self.draft(asks, within);
        if drafted.is_err() {
            // What was to be computed may not be there.
            self.sequences.values_mut().for_each(|held| (held.sure, held.tokens) = (0, Vec::new()));
        }
        drafted
    }

    fn forget(&mut self, job: u64) {
        self.kept.extend(self.sequences.remove(&job));
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::OnceLock;

    use backend::{DType, DeviceOptions, Group};
    use backend_cpu::CpuBackend;
    use models::Checkpoint;
    use models::replay::Rank;

    use super::*;

    const CONFIG: &str = r#"{
        "model_type": "qwen3", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 256, "tie_word_embeddings": false, "torch_dtype": "float32"
    }"#;
    const BLOCK: u32 = 8;
    const LONG: Duration = Duration::from_secs(1000);

    fn checkpoint() -> &'static Checkpoint {
        static CHECKPOINT: OnceLock<Checkpoint> = OnceLock::new();
        CHECKPOINT.get_or_init(|| {
            let dir: PathBuf = std::env::temp_dir().join(format!("baton-draft-{}", std::process::id()));
            std::fs::create_dir_all(&dir).expect("a directory for the model");
            std::fs::write(dir.join("config.json"), CONFIG).expect("the model's configuration");
            let checkpoint = Checkpoint::dummy(&dir, 5).expect("a dummy checkpoint");
            std::fs::remove_dir_all(&dir).expect("cleans up");
            checkpoint
        })
    }

    fn device() -> DeviceOptions {
        DeviceOptions { dtype: DType::F32, threads: 1, block_tokens: BLOCK, ..DeviceOptions::default() }
    }

    fn draft(blocks: u32) -> DraftModel<CpuBackend> {
        let mut backend = CpuBackend::open(&device(), Group::alone()).expect("the CPU");
        let model = Model::load(&mut backend, checkpoint(), 0, 1, DType::F32, &mut |_| {}).expect("a model");
        let bytes = u64::from(blocks * BLOCK) * model.kv_spec().token_bytes() as u64;
        DraftModel::new(backend, model, bytes).expect("a draft model")
    }

    fn text(seed: u32, len: usize) -> Vec<u32> {
        (0..len as u32)
            .map(|i| (i.wrapping_mul(2_654_435_761).wrapping_add(seed * 40_503) >> 7) % 96)
            .collect()
    }

    fn rule(temperature: f32, tokens: &[u32]) -> Rule {
        Rule { temperature, seed: 3, position: tokens.len() as u64, ..Rule::GREEDY }
    }

    fn ask(job: u64, tokens: &[u32], most: usize) -> Ask<'_> {
        Ask { job, tokens, most, salt: b"", rule: rule(0.0, tokens) }
    }

    /// What the model itself draws behind `tokens`, token by token.
    fn drawn(tokens: &[u32], count: usize, temperature: f32) -> Vec<u32> {
        let mut rank =
            Rank::<CpuBackend>::open(&device(), Group::alone(), checkpoint(), tokens.len() + count)
                .expect("the model alone");
        rank.begin(SeqId(1), tokens.len() + count).expect("room");
        let (mut all, mut computed) = (tokens.to_vec(), 0);
        for _ in 0..count {
            let logits = rank.feed(SeqId(1), computed as u32, &all[computed..], usize::MAX).expect("a step");
            computed = all.len();
            let draw = Draw::Token(rule(temperature, &all));
            let Drawn::Token(id) = backend::draw::drawn(&logits.expect("logits"), &draw) else {
                panic!("no token")
            };
            all.push(id);
        }
        all.split_off(tokens.len())
    }

    fn guesses(draft: &mut DraftModel<CpuBackend>, asks: &[Ask<'_>]) -> Vec<Option<Vec<u32>>> {
        draft.guess(asks, LONG).expect("a guess").guesses
    }

    /// Protects: guesses are what the draft model would say, greedy or drawn by the sequence's own rule, of several sequences at
    /// once, however many tokens each is asked for, and behind tokens that it has guessed wrong or right.
    #[test]
    fn guesses_are_the_draft_models_own_answers() {
        let mut draft = draft(64);
        let mut texts = [text(1, 20), text(2, 31), text(3, 5)];
        for round in 0..6 {
            let most = [4, 1, 3].map(|most| 1 + (most + round) % 5);
            let temperatures = [0.0, 0.9, 0.4];
            let asks: Vec<_> = (0..3)
                .map(|at| Ask {
                    rule: rule(temperatures[at], &texts[at]),
                    ..ask(at as u64, &texts[at], most[at])
                })
                .collect();
            let said = guesses(&mut draft, &asks);
            for at in 0..3 {
                let own = drawn(&texts[at], most[at], temperatures[at]);
                assert_eq!(said[at].as_ref(), Some(&own), "round {round}, sequence {at}");
                // Some of it is right, or all, or none.
                let held = (round + at) % (own.len() + 1);
                texts[at].extend(&own[..held]);
                texts[at].push((own.get(held).copied().unwrap_or(7) + 1) % 96);
            }
        }
    }

    /// Protects: a long prompt is read in pieces, while others have their guesses; reading it ahead is part of that.
    #[test]
    fn a_prompt_is_read_in_pieces() {
        let mut draft = draft(64);
        let (long, short) = (text(1, 200), text(2, 4));
        let both = [ask(1, &long, 2), ask(2, &short, 2)];
        let said = guesses(&mut draft, &both);
        assert_eq!((&said[0], said[1].as_ref()), (&None, Some(&drawn(&short, 2, 0.0))));
        let mut calls = 1;
        while draft.guess(&[ask(1, &long, 0)], Duration::ZERO).expect("reads").guesses == [None] {
            calls += 1;
        }
        // Then as few rows as it ever reads; the last one is read with the guess.
        assert_eq!(calls, 1 + (199usize - ROWS_UNKNOWN).div_ceil(ROWS_MIN));
        assert_eq!(guesses(&mut draft, &both[..1]), [Some(drawn(&long, 2, 0.0))]);
    }

    /// Protects: the next turn of a conversation is read from where it is new, for those of the same salt.
    #[test]
    fn what_begins_alike_is_not_read_twice() {
        let mut draft = draft(128);
        let mut turn = text(1, 180);
        while guesses(&mut draft, &[ask(1, &turn, 3)]) == [None] {}
        draft.forget(1);
        turn.extend(text(2, 20));
        let foreign = Ask { salt: b"another", ..ask(2, &turn, 3) };
        assert_eq!(draft.guess(&[foreign], Duration::ZERO).expect("reads").guesses, [None]);
        let mut calls = 1;
        while draft.guess(&[ask(3, &turn, 3)], Duration::ZERO).expect("reads").guesses == [None] {
            calls += 1;
        }
        assert_eq!(calls, 20usize.div_ceil(ROWS_MIN));
        assert_eq!(guesses(&mut draft, &[ask(3, &turn, 3)]), [Some(drawn(&turn, 3, 0.0))]);
        assert!(draft.kept.is_empty());
        // Another conversation has the first words in common: this one stays.
        draft.forget(3);
        let other = [&turn[..50], &text(5, 20)].concat();
        while guesses(&mut draft, &[ask(4, &other, 3)]) == [None] {}
        assert_eq!(draft.kept.len(), 1);
    }

    /// Protects: every block comes back, and where there is none, or no context, nothing is guessed and nothing fails.
    #[test]
    fn what_has_no_room_is_not_guessed() {
        let mut draft = draft(4);
        let (first, second) = (text(1, 20), text(2, 20));
        let [Some(some), Some(none)] = &guesses(&mut draft, &[ask(1, &first, 3), ask(2, &second, 3)])[..]
        else {
            panic!("both are answered")
        };
        assert_eq!((some.len(), none.len()), (3, 0));
        draft.forget(1);
        draft.forget(7);
        assert_eq!(guesses(&mut draft, &[ask(2, &second, 3)]), [Some(drawn(&second, 3, 0.0))]);
        // Who is kept makes room, and is held once.
        assert_eq!((draft.kept.len(), draft.sequences.len()), (0, 1));
        draft.forget(2);
        assert_eq!((draft.kept.len(), draft.sequences.len(), draft.kv.usage().used), (1, 0, 3));
        let all = text(4, 30);
        assert_eq!(guesses(&mut draft, &[ask(3, &all, 2)]), [Some(drawn(&all, 2, 0.0))]);
        draft.forget(3);
        assert_eq!((draft.kept.len(), draft.kv.usage().used), (1, 4));

        let mut draft = self::draft(64);
        let near = text(1, 254);
        while guesses(&mut draft, &[ask(1, &near, 5)]) == [None] {}
        assert_eq!(guesses(&mut draft, &[ask(1, &near, 5)]), [Some(drawn(&near, 2, 0.0))]);
        assert_eq!(guesses(&mut draft, &[ask(2, &text(1, 256), 5)]), [Some(vec![])]);
        assert_eq!(
            guesses(&mut draft, &[ask(3, &[1, 96, 2], 5)]),
            [Some(vec![])],
            "an id that it does not have"
        );
    }
}

//! Teacher-forced runs over one or several ranks, as threads, with or without a handover of the prompt's cache.

use std::sync::mpsc;
use std::thread;

use backend::{
    Activations, Backend, CpuOptions, DType, DeviceOptions, Group, KvExport, KvLanding, KvStore, Piece,
};
use backend_cpu::CpuBackend;
use models::Checkpoint;
use models::replay::Rank;

use crate::fixture::{Prompt, SEQ, options};

/// How to compute.
#[derive(Clone, Copy)]
pub struct Run {
    pub dtype: DType,
    pub world: usize,
    /// Prompt tokens per step.
    pub chunk: usize,
    /// The prompt is computed by one rank, and its cache given to `world` others.
    pub handoff: bool,
    /// Activations in 8 bits.
    pub int8: bool,
}

impl Run {
    pub fn new(dtype: DType) -> Run {
        Run { dtype, world: 1, chunk: 512, handoff: false, int8: false }
    }

    /// Logits `[steps, vocabulary]`: after the prompt, and after each id of `greedy` but the last.
    pub fn logits(self, checkpoint: &Checkpoint, prompt: &Prompt) -> Vec<f32> {
        self.logits_on::<CpuBackend>(checkpoint, prompt)
    }

    /// The same on another device.
    pub fn logits_on<B: Backend>(self, checkpoint: &Checkpoint, prompt: &Prompt) -> Vec<f32> {
        let len = prompt.prompt.len();
        let activations = if self.int8 { Activations::Int8 } else { Activations::Exact };
        let cpu = CpuOptions { activations, ..CpuOptions::default() };
        let options = DeviceOptions { cpu, ..options(self.dtype) };
        let open = |group| Rank::<B>::open(&options, group, checkpoint, len + prompt.greedy.len());
        let mut logits = Vec::new();
        let mut source = None;
        if self.handoff {
            let mut rank = open(Group::alone()).unwrap();
            rank.begin(SEQ, len).unwrap();
            logits.extend(rank.feed(SEQ, 0, &prompt.prompt, self.chunk).unwrap().unwrap());
            source = Some(rank);
        }
        let groups = Group::local(self.world).unwrap();
        // Each rank says what it holds, and is sent that.
        let (ask, asked) = mpsc::channel();
        thread::scope(|scope| {
            let ranks: Vec<_> = groups
                .into_iter()
                .map(|group| {
                    let (open, ask) = (&open, ask.clone());
                    scope.spawn(move || {
                        let mut rank = open(group).unwrap();
                        rank.begin(SEQ, len + prompt.greedy.len()).unwrap();
                        let mut logits = Vec::new();
                        if self.handoff {
                            let mut landing = rank.kv.land(SEQ, 0..len as u32).unwrap();
                            let (give, given) = mpsc::channel::<(Piece, Vec<u8>)>();
                            ask.send((rank.model.kv_spec().clone(), give)).unwrap();
                            given.iter().for_each(|(piece, bytes)| landing.write(&piece, &bytes).unwrap());
                            rank.kv.commit(landing).unwrap();
                        } else {
                            logits.extend(
                                rank.feed(SEQ, 0, &prompt.prompt, self.chunk).unwrap().into_iter().flatten(),
                            );
                        }
                        for (at, id) in (len as u32..).zip(&prompt.greedy[..prompt.greedy.len() - 1]) {
                            logits.extend(rank.feed(SEQ, at, &[*id], 1).unwrap().into_iter().flatten());
                        }
                        logits
                    })
                })
                .collect();
            drop(ask);
            if let Some(source) = &mut source {
                for (spec, give) in asked {
                    for layer in 0..spec.layers {
                        let export = source.kv.export(SEQ, layer, 0..len as u32).unwrap();
                        export.wait().unwrap();
                        for (plane, heads) in spec.planes.iter().map(|plane| plane.heads()).enumerate() {
                            let piece = Piece { layer, plane, heads, tokens: 0..len as u32 };
                            let mut bytes = Vec::new();
                            export.read(&piece, &mut bytes).unwrap();
                            give.send((piece, bytes)).unwrap();
                        }
                    }
                }
            }
            let results: Vec<Vec<f32>> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
            assert!(results[1..].iter().all(Vec::is_empty), "only rank 0 has logits");
            logits.extend(&results[0]);
        });
        logits
    }
}

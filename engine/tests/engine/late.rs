//! The CPU backend as a device that computes by itself would look to the engine: what a step drew is there when it is
//! waited for, not before. It notes the order of calls.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex};

use backend::{
    Attend, Backend, BackendError, Batch, Caps, DeviceOptions, Glu, Group, KvError, KvSpec, Mla, Moe, Out,
    Output, Pending, SeqId, Step, WeightSource,
};
use backend_cpu::{CpuAct, CpuBackend, CpuExport, CpuKv, CpuStep, CpuWeight};

/// What the device was asked, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// The step of this number was submitted; it takes tokens that the one before drew.
    Submitted { step: usize, in_flight: bool },
    /// Somebody waited for it.
    Waited(usize),
}

/// The calls so far.
pub type Calls = Arc<Mutex<Vec<Call>>>;

/// The CPU, whose results come late or, as they do, at once.
pub struct Late {
    cpu: CpuBackend,
    late: bool,
    steps: usize,
    calls: Calls,
    /// Its own fabric comes up for as long as the other end is there, and then fails.
    pub fabric: Option<Receiver<()>>,
}

impl Late {
    /// `late`: steps are ready when they are waited for.
    pub fn open(
        options: &DeviceOptions,
        group: Group,
        late: bool,
        calls: Calls,
    ) -> Result<Self, BackendError> {
        Ok(Late { cpu: CpuBackend::open(options, group)?, late, steps: 0, calls, fabric: None })
    }
}

fn note(calls: &Calls, call: Call) {
    calls.lock().expect("no panic").push(call);
}

/// A step of [`Late`].
pub struct LateStep<'a> {
    cpu: CpuStep<'a>,
    late: bool,
    step: usize,
    in_flight: bool,
    calls: &'a Calls,
}

/// What is there when it is waited for.
struct LatePending {
    cpu: Box<dyn Pending<CpuAct>>,
    late: bool,
    step: usize,
    calls: Calls,
}

impl Backend for Late {
    type Weight = CpuWeight;
    type Act = CpuAct;
    type Hidden = CpuAct;
    type Kv = CpuKv;
    type Step<'a> = LateStep<'a>;

    fn open(options: &DeviceOptions, group: Group) -> Result<Self, BackendError> {
        Late::open(options, group, true, Calls::default())
    }

    fn caps(&self) -> Caps {
        self.cpu.caps()
    }

    fn load(&mut self, source: &WeightSource<'_>) -> Result<CpuWeight, BackendError> {
        self.cpu.load(source)
    }

    fn kv(&mut self, spec: &KvSpec, bytes: u64) -> Result<CpuKv, BackendError> {
        self.cpu.kv(spec, bytes)
    }

    fn step<'a>(&'a mut self, kv: &'a mut CpuKv, batch: &'a Batch) -> LateStep<'a> {
        self.steps += 1;
        LateStep {
            late: self.late,
            step: self.steps,
            in_flight: batch.in_flight(),
            calls: &self.calls,
            cpu: self.cpu.step(kv, batch),
        }
    }

    fn regroup(&mut self, group: Group) -> Result<(), BackendError> {
        if let Some(fabric) = &self.fabric {
            // Nothing is sent.
            let _ = fabric.recv();
            let reason = "no fabric".to_owned();
            return Err(BackendError::Unavailable { backend: "late", reason });
        }
        self.cpu.regroup(group)
    }
}

/// As the CPU's; the types of the backends differ only in name.
impl Step for LateStep<'_> {
    type Backend = Late;

    fn embed(&mut self, table: &CpuWeight) -> CpuAct {
        self.cpu.embed(table)
    }

    fn resume(&mut self, hidden: CpuAct) -> CpuAct {
        self.cpu.resume(hidden)
    }

    fn norm(&mut self, x: &CpuAct, weight: &CpuWeight, eps: f32) -> CpuAct {
        self.cpu.norm(x, weight, eps)
    }

    fn linear(&mut self, x: &CpuAct, weight: &CpuWeight) -> CpuAct {
        self.cpu.linear(x, weight)
    }

    fn add(&mut self, x: CpuAct, y: CpuAct) -> CpuAct {
        self.cpu.add(x, y)
    }

    fn glu(&mut self, x: CpuAct, kind: Glu) -> CpuAct {
        self.cpu.glu(x, kind)
    }

    fn rows(&mut self, x: CpuAct, rows: &[u32]) -> CpuAct {
        self.cpu.rows(x, rows)
    }

    fn all_reduce(&mut self, x: CpuAct) -> CpuAct {
        self.cpu.all_reduce(x)
    }

    fn bias(&mut self, x: CpuAct, bias: &CpuWeight) -> CpuAct {
        self.cpu.bias(x, bias)
    }

    fn attend(&mut self, layer: usize, qkv: CpuAct, attend: &Attend<'_, Late>) -> CpuAct {
        let qk_norm = attend.qk_norm.as_ref().map(|norm| backend::QkNorm {
            q: norm.q,
            k: norm.k,
            eps: norm.eps,
            span: norm.span.clone(),
        });
        let attend = Attend {
            heads: attend.heads,
            kv_heads: attend.kv_heads,
            head_dim: attend.head_dim,
            scale: attend.scale,
            rope: attend.rope,
            qk_norm,
            window: attend.window,
            sinks: attend.sinks,
        };
        self.cpu.attend(layer, qkv, &attend)
    }

    fn attend_mla(&mut self, _layer: usize, _q: CpuAct, _kv: CpuAct, _mla: &Mla<'_, Late>) -> CpuAct {
        panic!("the model of these tests has no latent attention")
    }

    fn moe(&mut self, _x: &CpuAct, _moe: &Moe<'_, Late>) -> CpuAct {
        panic!("the model of these tests has no experts")
    }

    fn export(
        &mut self,
        seq: SeqId,
        layer: usize,
        tokens: std::ops::Range<u32>,
    ) -> Result<CpuExport, KvError> {
        self.cpu.export(seq, layer, tokens)
    }

    fn submit(self, out: Out<CpuAct>) -> Box<dyn Pending<CpuAct>> {
        let LateStep { cpu, late, step, in_flight, calls } = self;
        note(calls, Call::Submitted { step, in_flight });
        Box::new(LatePending { cpu: cpu.submit(out), late, step, calls: calls.clone() })
    }
}

impl Pending<CpuAct> for LatePending {
    fn ready(&self) -> bool {
        !self.late
    }

    fn wait(self: Box<Self>) -> Result<Output<CpuAct>, BackendError> {
        note(&self.calls, Call::Waited(self.step));
        self.cpu.wait()
    }
}

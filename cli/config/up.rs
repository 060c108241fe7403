//! Settings of `baton up`.

use std::path::PathBuf;

use anyhow::{Result, ensure};
use backend::{Activations, DType};
use node::KvTransport;
use router::placement::Disaggregation;

use super::setting::settings;
use super::value::{Name, Size};

/// Processes of one `up`; more is a mistake on one machine.
const PROCESSES_MAX: usize = 64;

settings! {
    /// What a whole cluster on one machine is told.
    pub struct UpSettings {
        /// Directory or GGUF file of the model, or its name on the Hugging Face hub (ORG/NAME) [default: the bundled one]
        model: Option<PathBuf> ["MODEL"];
        /// Name that clients ask for [default: the directory's, or NAME]
        served_name: Option<Name> ["NAME"];
        /// Number of prefill nodes
        prefill: usize ["N"] = "1";
        /// Number of decode groups
        decode: usize ["N"] = "1";
        /// Processes per decode group, each holding a part of the model (tensor parallel)
        tp: usize ["N"] = "2";
        /// Port for HTTP clients, on 127.0.0.1
        port: u16 ["PORT"] = "8000";
        /// Longest sequence [default: the model's]
        context: Option<u32> ["TOKENS"];
        /// Memory for KV, per process
        kv_memory: Size ["SIZE"] = "256MiB";
        /// Sequences that run at once, per node
        max_batch: usize ["SEQUENCES"] = "16";
        /// Tokens guessed ahead per sequence and step at most, from what prompt and answer repeat; 0: none
        draft_max: usize ["TOKENS"] = "16";
        /// Small model with the same tokens that guesses ahead, too: directory, GGUF file or name on the hub
        draft_model: Option<PathBuf> ["MODEL"];
        /// Type of activations and KV: bf16 or f32
        dtype: DType ["TYPE"] = "bf16";
        /// What carries KV between the processes: auto (shared memory by UCX where it is installed, else TCP), tcp or ucx
        kv_transport: KvTransport ["NAME"] = "auto";
        /// How activations meet quantised weights on the CPU: exact, or int8 (rounded to 8 bits: coarser, faster for few rows)
        cpu_activations: Activations ["NAME"] = "exact";
        /// Who computes prompts: always (prefill nodes), auto (whoever is estimated to be sooner) or never
        disaggregation: Disaggregation ["MODE"] = "always";
        /// OpenTelemetry collector that spans are sent to, over OTLP/HTTP, such as http://127.0.0.1:4318 [default: no traces]
        otlp_endpoint: Option<String> ["URL"];
        /// First port of the nodes' own metrics pages: prefill nodes, then the leaders of decode groups [default: no pages]
        metrics_port: Option<u16> ["PORT"];
        /// Log filter of the processes
        log: String ["FILTER"] = "warn,loading=info";
    }
}

impl UpSettings {
    fn check(&self) -> Result<()> {
        ensure!(self.port > 0, "port is 0: clients must know where to ask");
        ensure!(self.decode > 0, "decode is 0: nobody would generate tokens");
        ensure!(self.tp > 0, "tp is 0: a decode group has at least one rank");
        super::check_drafts(self.draft_max, self.draft_model.is_some())?;
        let pages = self.prefill.saturating_add(self.decode);
        let room = 1 + usize::from(u16::MAX - self.metrics_port.unwrap_or(0));
        ensure!(pages <= room, "metrics-port leaves {room} ports for {pages} pages");
        ensure!(self.metrics_port != Some(0), "metrics-port is 0: a scraper must know where to ask");
        let processes = self.processes();
        ensure!(processes <= PROCESSES_MAX, "{processes} processes on one machine; at most {PROCESSES_MAX}");
        Ok(())
    }

    /// Processes in all, the router included.
    pub fn processes(&self) -> usize {
        1usize.saturating_add(self.prefill).saturating_add(self.decode.saturating_mul(self.tp))
    }
}

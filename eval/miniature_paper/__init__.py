"""The paper's experiments in small, written as any user of ether_diffusion would: `make paper-mini`."""

# ruff: noqa: E501
"""Sample calls for everything that torch lets be overridden: each as Python source over ``y, z, i, m``.

``y`` is any float tensor, ``z`` one with values between 0 and 1, both (batch, 4, 4) and with a gradient; ``i`` holds
whole numbers from 0 to 3, ``m`` truth values.
"""

from __future__ import annotations

#: Argument lists that are tried in turn: the first that a function takes.
FORMS = """
(y) (z) (y,z) (y,0) (y,2) (y,0.5) (y,1,2) (y,z,z) (i) (i,i) (i,1) (m) (m,m) (y,1,i) (y,1,i,z) (y,m,0.5) (y,m) (y,m,z)
([y,z]) (y,(1,2)) (y,(0,2,1)) (y,[y.shape[0],16]) (y,y.shape[0],16) (y,1,0,2) (y,2,1) (y[0]) (y[0],z[0]) (y[0,0])
(y[0,0],z[0,0]) (y[0],z[0],y[0]) (y,z,z,y) (y[0],z[0,0]) (y[0],z[0,0],y[0,0]) (y[:,:,0],y,z) (y.mT@y+torch.eye(4))
(y.mT@y+torch.eye(4),z) (z,1,0,1) (y,torch.float64) (y.shape) (4) ((2,2)) (2,3) (0,4,1) (0.,1.,4) (y,1,1,1)
(y,1,i[0,0],z) (y,[0,1]) (y,[1,1]) (y,[2,2]) (y,(4,)) (y,4,(4,)) (y,(4,),None,None) (i,z) (i[0],torch.ones(4,4))
(y,2,2) (y,1,0,1) (torch.complex(y,z)) (torch.complex(y,z),torch.complex(y,z)) (y,0.5,True) (y,1.0,2.0) ([y,z],1)
(y,z,1) (y,z,0.5) (y,i[:,0]) (y,y.shape) (y,0,i[0,0]) (y,0,1) (y,z,y,z) (i[0,0]) (i[0,0],2) (y,1,3,2) (y,4)
('bij,bjk->bik',y,z) (y,2,3) (y,z,i[:,0]) (y.double()) (y,z[0,0],y[0,0]) (y,z[0],y[0,0]) (i,torch.randn(9,4))
(y.to(torch.bfloat16)) (y,y[0,0],z[0,0]) (y,0,torch.tensor([0]),z[:1]) (y,0,torch.tensor([0]),1.0) (y[0],y,z)
(y[0,0],y[0],z[0,0]) (y,1,i[0,0]) (y,(i[:,0,0]%2,),z[0]) (y,1,i[0,0],z,'mean') (y,1,i,z,'sum') (1,y) (y[0],1)
(y,[1,3],1) (y,1,(2,2)) (y[...,:2]) (y,z[:,0],1,0) (y[...,:3],z[...,:3]) (y.mT@y+torch.eye(4),z,upper=False)
(y[0],z[0,0],y[0,0],1) (y,y.shape,y.stride()) (y,z,y.shape,y.stride()) (torch.ones(3),y) (y,'f') (y,i) (y,False)
(i[:,0],y[0]) (i[:,0],y[0],torch.tensor([0]))
(y[None],z[None,:,:1,:1,None].expand(1,-1,1,2,2)[:,:1]) (y[None],(2,2)) (y[None],2) (y[None,None],2) (y[None,None],(2,2,2))
(y[None,None],(2,2,2),(1,1,1)) (y[:,:2,:3],(y.shape[0],1,4,4)) (y[:,:2,:3],(y.shape[0],1,4,4),True)
(y[:,None],z[...,None].expand(-1,-1,-1,2)) (y[:,None],z[...,None].expand(-1,-1,-1,2),0,0) 
(y[:,None],z[...,None].expand(-1,-1,-1,2),0,0,True) (y[:,:,0],z[:,:,0],torch.ones(y.shape[0]))
(y,z[0,0],y[0,0],None,None,True,0.1,1e-5) (y,None,None,True) (y,None,None,None,None,True,0.1,1e-5,False)
(y,torch.zeros(4),torch.ones(4)) (y,None,None,None,None,True,0.1,1e-5)
(y,0.1,0,-8,7) (y,torch.full((4,),0.1),torch.zeros(4,dtype=torch.int32),1,-8,7) (y[0,:,:2],z,0.5)
(y,[4],None,None,1e-5) (y,None,None,y.shape[0],4,4,2,1e-5) (y[0],3,i[0]) (y.reshape(-1),4) (y.reshape(-1),4,return_complex=True)
(torch.stft(y.reshape(-1),4,window=torch.ones(4),return_complex=True),4,window=torch.ones(4)) ([y[0],z[0],y[0]])
(z[0],2) (y,i,z) (y,y,z) (y,i,i,z)
(y[0].relu().argmax(-1),y[0]) (y,z.transpose(1,2),None,None,1,0,1,1)
(y[:,None],z[:1,None,:2,:2]) (y[:,None,None],z[:1,None,None,:2,:2].expand(1,1,2,2,2)[:,:,:1]) 
(y.movedim(2,0),torch.randn(2,4,3),torch.zeros(3)) (y,z[:4,:4,:1].expand(-1,4,1)[:1].expand(4,4,1)) (y,z[:1].expand(1,4,4).transpose(0,1)[:4,:1,:].expand(4,4,4)) 
(y,torch.eye(4)[:,:,None]) (y[:,:,:,None],torch.eye(4)[:,:,None,None]) (y[:,:,:,None,None],torch.eye(4)[:,:,None,None,None])
(y[:,:,:,None],torch.eye(4)[:,:,None,None],None,[1,1],[0,0],[1,1],False,[0,0],1)
(*torch.linalg.lu_factor(y.mT@y+torch.eye(4)),z) (z,*torch.linalg.lu_factor(y.mT@y+torch.eye(4)))
(torch.linalg.ldl_factor(y.mT@y+torch.eye(4))[0],torch.linalg.ldl_factor(y.mT@y+torch.eye(4))[1],z)
(y,z[:,0],y) (y,0,(0,0)) (m[0,0],2) (y.relu(),i%2) (y[:,0],i[:,0]%4) (y,size=5)
(y.log_softmax(-1).movedim(0,1),i[:,0].clamp(1,3)[:,:2],torch.full((y.shape[0],),4),torch.full((y.shape[0],),2))
(y[0,0],[z[0]],None) (y[0],torch.randn(12,4),torch.randn(12,4)) (y[0],z[0],torch.randn(12,4),torch.randn(12,4))
(y[0],z[0],torch.randn(4,4),torch.randn(4,4)) (y[0],(z[0],z[0]),torch.randn(16,4),torch.randn(16,4))
(y,torch.zeros(1,y.shape[0],4),[torch.eye(4),torch.eye(4),torch.zeros(4),torch.zeros(4)],True,1,0.0,False,False,True)
(y,torch.zeros(1,y.shape[0],4),[torch.randn(12,4),torch.randn(12,4),torch.zeros(12),torch.zeros(12)],True,1,0.0,False,False,True)
(y,(torch.zeros(1,y.shape[0],4),torch.zeros(1,y.shape[0],4)),[torch.randn(16,4),torch.randn(16,4),torch.zeros(16),torch.zeros(16)],True,1,0.0,False,False,True)
(y,y,y,4,2,torch.randn(12,4),torch.zeros(12),None,None,False,0.0,torch.eye(4),torch.zeros(4))
(y[:,None],torch.rand(y.shape[0],1,2)) (y[:,None,None],2,output_size=2,_random_samples=torch.rand(y.shape[0],1,3)) 
(y[None,:,None],2,output_size=(1,2,2))
(*torch.nn.functional.max_pool1d(y,2,return_indices=True),2) (*torch.nn.functional.max_pool2d(y[:,None],2,return_indices=True),2)
(*torch.nn.functional.max_pool3d(y[:,None,None],(1,2,2),return_indices=True),(1,2,2))
(y,True,False,1.0,'mean') (y,z,True,False,1e-8,1) (*torch.geqrf(y),z) (y.reshape(-1,2,2,4)) (y,(1,2),(1,2),(0,1))
(y[:,:,:,None,None],2) (y[:,None,None],(1,2,2)) (y[None,:,None],(1,2,2))
(*torch.linalg.lu_factor(y),) (y,[2,2],dim=1) (y.reshape(-1),y.shape) (y,1,[2,2]) 
(y[:,None],torch.zeros(y.shape[0],2,2,2),0,0,False) (y[:,None,None],torch.zeros(y.shape[0],2,2,2,3),0,0,False)
(torch.zeros(y.shape[0],2,3),(y.shape[0],1,2,2),False) (y[:,None],torch.zeros(y.shape[0],2,2,2)) (y,i,z,'sum')
(y,0,i[0,0]%2,z[:1].expand(4,4,4),'amax') (y,1,i[0,0],z,'amax') (y,[[0,1]]) ([y[0],z[0]])
(y.tril()+5*torch.eye(4),z,upper=False) (torch.eye(4)+torch.zeros(4,4),2) (y[:,:2,:2].reshape(-1,1,2,2)) (y,2,[0,1])
""".split()

#: What needs more than arguments: the whole call.
CALLS = {
    "torch.Tensor.H.__get__": "y[0].H",
    "torch.Tensor.imag.__get__": "torch.complex(y,z).imag",
    "torch.Tensor.grad_dtype.__get__": "i.grad_dtype",
    "torch.Tensor.__setitem__": "y.__setitem__((slice(None),0),z[:,0])",
    "torch.Tensor.__getitem__": "y[:,1:,None,[0,2]]",
    "torch.Tensor.float_power_": "y.double().float_power_(2)",
    "torch.Tensor.addr_": "z[0].clone().addr_(y[0,0],y[0,1])",
    "torch.Tensor.fill_diagonal_": "z[0].clone().fill_diagonal_(1.0)",
    "torch.Tensor.register_hook": "y.register_hook(print)",
    "torch.Tensor.apply_": "y.detach().apply_(abs)",
    "torch.Tensor.map_": "y.detach().map_(z.detach(),max)",
    "torch.Tensor.map2_": "y.detach().map2_(z.detach(),z.detach(),max)",
    "torch.Tensor.__bool__": "bool(y.sum())",
    "torch.Tensor.__nonzero__": "y.sum().__nonzero__()",
    "torch.Tensor.__float__": "float(y.sum())",
    "torch.Tensor.__int__": "int(y.sum())",
    "torch.Tensor.__long__": "y.sum().__long__()",
    "torch.Tensor.__complex__": "complex(y.sum())",
    "torch.Tensor.__index__": "i[0,0,0].__index__()",
    "torch.Tensor.item": "y.sum().item()",
    "torch.Tensor.is_nonzero": "y.sum().is_nonzero()",
    "torch.is_nonzero": "torch.is_nonzero(y.sum())",
    "torch.Tensor.__format__": "format(y)",
    "torch.Tensor.__deepcopy__": "y.detach().__deepcopy__({})",
    "torch.Tensor.retain_grad": "y.clone().retain_grad()",
    "torch.Tensor.register_post_accumulate_grad_hook": "y.detach().requires_grad_().register_post_accumulate_grad_hook(print)",
    "torch.Tensor.backward": "y.sum().backward(retain_graph=True)",
    "torch.Tensor.as_strided_": "y.clone().as_strided_((2,2),(4,1))",
    "torch.Tensor.is_coalesced": "y.to_sparse().is_coalesced()",
    "torch.Tensor._nnz": "y.to_sparse()._nnz()",
    "torch.embedding": "torch.embedding(y[0],i)",
    "torch.index_select": "y.index_select(1,i[0,0])",
    "torch.unflatten": "torch.unflatten(y,1,(2,2))",
    "torch.cross": "torch.cross(y[...,:3],z[...,:3],dim=-1)",
    "torch.Tensor.cross": "y[...,:3].cross(z[...,:3],dim=-1)",
    "torch.linalg.cross": "torch.linalg.cross(y[...,:3],z[...,:3])",
    "torch.linalg.multi_dot": "torch.linalg.multi_dot([y[0],z[0],y[0]])",
    "torch.linalg.tensorinv": "torch.linalg.tensorinv(y[0]@y[0].T+torch.eye(4),1)",
    "torch.view_as_complex": "torch.view_as_complex(y.reshape(-1,4,2,2))",
    "torch.view_as_complex_copy": "torch.view_as_complex_copy(y.detach().reshape(-1,4,2,2))",
    "torch.grid_sampler": "torch.grid_sampler(y[:,None],z[...,:2].reshape(-1,2,2,2),0,0,False)",
    "torch.grid_sampler_2d": "torch.grid_sampler_2d(y[:,None],z[...,:2].reshape(-1,2,2,2),0,0,False)",
    "torch.grid_sampler_3d": "torch.grid_sampler_3d(y[:,None,None],z[...,:3].reshape(-1,1,2,2,3),0,0,False)",
    "torch.nn.functional.grid_sample": "torch.nn.functional.grid_sample(y[:,None],z[...,:2].reshape(-1,2,2,2),align_corners=False)",
    "torch.nn.functional.affine_grid": "torch.nn.functional.affine_grid(y[:,:2,:3],(y.shape[0],1,4,4),False)",
    "torch.affine_grid_generator": "torch.affine_grid_generator(y[:,:2,:3],(y.shape[0],1,4,4),False)",
    "torch.Tensor.unflatten": "y.unflatten(1,(2,2))",
    "torch.nn.functional.binary_cross_entropy": "torch.nn.functional.binary_cross_entropy(z,m.float())",
    "torch.nn.functional.multi_margin_loss": "torch.nn.functional.multi_margin_loss(y[0],i[0,0])",
    "torch.nn.functional.multilabel_margin_loss": "torch.nn.functional.multilabel_margin_loss(y[0],i[0])",
    "torch.nn.functional.lp_pool3d": "torch.nn.functional.lp_pool3d(y[:,None,None],2.0,(1,2,2))",
    "torch.split_with_sizes": "torch.split_with_sizes(y,[1,3],1)",
    "torch.tensor_split": "torch.tensor_split(y,2,1)",
    "torch.native_group_norm": "torch.native_group_norm(y,None,None,y.shape[0],4,4,2,1e-5)",
    "torch.native_batch_norm": "torch.native_batch_norm(y,None,None,None,None,True,0.1,1e-5)",
    "torch.native_layer_norm": "torch.native_layer_norm(y,[4],None,None,1e-5)",
    "torch.instance_norm": "torch.instance_norm(y,None,None,None,None,True,0.1,1e-5,False)",
    "torch.batch_norm": "torch.batch_norm(y,None,None,None,None,True,0.1,1e-5,False)",
    "torch.nn.functional.batch_norm": "torch.nn.functional.batch_norm(y,None,None,training=True)",
    "torch.poisson_nll_loss": "torch.poisson_nll_loss(y,z,True,False,1e-8,1)",
    "torch.multinomial": "torch.multinomial(z[0],2)",
    "torch.Tensor.multinomial": "z[0].multinomial(2)",
    "torch.lu_solve": "torch.lu_solve(z,*torch.linalg.lu_factor(y.mT@y+torch.eye(4)))",
    "torch.Tensor.lu_solve": "z.lu_solve(*torch.linalg.lu_factor(y.mT@y+torch.eye(4)))",
    "torch.linalg.lu_solve": "torch.linalg.lu_solve(*torch.linalg.lu_factor(y.mT@y+torch.eye(4)),z)",
    "torch.lu_unpack": "torch.lu_unpack(*torch.linalg.lu_factor(y.mT@y+torch.eye(4)))",
    "torch.ormqr": "torch.ormqr(*torch.geqrf(y.detach()),z.detach())",
    "torch.Tensor.ormqr": "y.detach().ormqr(torch.geqrf(y.detach())[1],z.detach())",
    "torch.linalg.ldl_solve": "torch.linalg.ldl_solve(*torch.linalg.ldl_factor((y.mT@y+torch.eye(4)).detach()),z.detach())",
    "torch.linalg.solve_triangular": "torch.linalg.solve_triangular(y.tril()+5*torch.eye(4),z,upper=False)",
    "torch.polygamma": "torch.polygamma(1,z+1)",
    "torch.special.polygamma": "torch.special.polygamma(1,z+1)",
    "torch.functional.istft": "torch.istft(torch.stft(y.reshape(-1),4,window=torch.ones(4),return_complex=True),4,window=torch.ones(4))",
    "torch.Tensor.istft": "torch.stft(y.reshape(-1),4,window=torch.ones(4),return_complex=True).istft(4,window=torch.ones(4))",
    "torch.functional.stft": "torch.stft(y.reshape(-1),4,window=torch.ones(4),return_complex=True)",
    "torch.Tensor.stft": "y.reshape(-1).stft(4,window=torch.ones(4),return_complex=True)",
    "torch.nonzero_static": "torch.nonzero_static(y,size=5)",
    "torch.Tensor.nonzero_static": "y.nonzero_static(size=5)",
    "torch.nn.functional.ctc_loss": "torch.nn.functional.ctc_loss(y.log_softmax(-1).movedim(0,1),i[:,0].clamp(1,3)[:,:2],torch.full((y.shape[0],),4),torch.full((y.shape[0],),2))",
    "torch.ctc_loss": "torch.ctc_loss(y.log_softmax(-1).movedim(0,1),i[:,0].clamp(1,3)[:,:2],torch.full((y.shape[0],),4),torch.full((y.shape[0],),2),0,1,False)",
    "torch.nn.functional.cosine_embedding_loss": "torch.nn.functional.cosine_embedding_loss(y[:,0],z[:,0],torch.ones(y.shape[0]))",
    "torch.cosine_embedding_loss": "torch.cosine_embedding_loss(y[:,0],z[:,0],torch.ones(y.shape[0]))",
    "torch.fake_quantize_per_channel_affine": "torch.fake_quantize_per_channel_affine(y,torch.full((4,),0.1),torch.zeros(4,dtype=torch.int32),1,-8,7)",
    "torch.fake_quantize_per_tensor_affine": "torch.fake_quantize_per_tensor_affine(y,0.1,0,-8,7)",
    "torch.embedding_bag": "torch.embedding_bag(y[0],i[0,0],torch.tensor([0]))",
    "torch.Tensor.coalesce": "y.to_sparse().coalesce().to_dense()",
    "torch.Tensor.indices": "y.to_sparse().coalesce().indices()",
    "torch.Tensor.values": "y.to_sparse().coalesce().values()",
    "torch.Tensor._indices": "y.to_sparse()._indices()",
    "torch.Tensor._values": "y.to_sparse()._values()",
    "torch.Tensor.put_": "y.clone().put_(i,z)",
    "torch.Tensor.put": "y.put(i,z)",
    "torch.put": "torch.put(y,i,z)",
    "torch.Tensor.index_put_": "y.clone().index_put_((i[0,0]%2,),z[0])",
    "torch.Tensor.index_put": "y.index_put((i[0,0]%2,),z[0])",
    "torch.index_put": "torch.index_put(y,(i[0,0]%2,),z[0])",
    "torch.Tensor._to_dense": "y.to_sparse()._to_dense()",
    "torch.lstm": "torch.lstm(y,(torch.zeros(1,y.shape[0],4),torch.zeros(1,y.shape[0],4)),[z[0].repeat(4,1),z[0].repeat(4,1),torch.zeros(16),torch.zeros(16)],True,1,0.0,False,False,True)",
    "torch.gru": "torch.gru(y,torch.zeros(1,y.shape[0],4),[z[0].repeat(3,1),z[0].repeat(3,1),torch.zeros(12),torch.zeros(12)],True,1,0.0,False,False,True)",
    "torch.rnn_tanh": "torch.rnn_tanh(y,torch.zeros(1,y.shape[0],4),[z[0],z[0],torch.zeros(4),torch.zeros(4)],True,1,0.0,False,False,True)",
    "torch.rnn_relu": "torch.rnn_relu(y,torch.zeros(1,y.shape[0],4),[z[0],z[0],torch.zeros(4),torch.zeros(4)],True,1,0.0,False,False,True)",
    "torch.gru_cell": "torch.gru_cell(y[0],z[0],z[0].repeat(3,1),z[0].repeat(3,1))",
    "torch.lstm_cell": "torch.lstm_cell(y[0],(z[0],z[0]),z[0].repeat(4,1),z[0].repeat(4,1))",
    "torch.rnn_tanh_cell": "torch.rnn_tanh_cell(y[0],z[0],z[0],z[0])",
    "torch.rnn_relu_cell": "torch.rnn_relu_cell(y[0],z[0],z[0],z[0])",
    "torch.nn.functional.multi_head_attention_forward": "torch.nn.functional.multi_head_attention_forward(y,y,y,4,2,z[0].repeat(3,1),torch.zeros(12),None,None,False,0.0,z[0],torch.zeros(4))",
    "torch.nn.functional.max_unpool1d": "torch.nn.functional.max_unpool1d(*torch.nn.functional.max_pool1d(y,2,return_indices=True),2)",
    "torch.nn.functional.max_unpool2d": "torch.nn.functional.max_unpool2d(*torch.nn.functional.max_pool2d(y[:,None],2,return_indices=True),2)",
    "torch.nn.functional.max_unpool3d": "torch.nn.functional.max_unpool3d(*torch.nn.functional.max_pool3d(y[:,None,None],(1,2,2),return_indices=True),(1,2,2))",
    "torch.nn.functional.max_pool3d_with_indices": "torch.nn.functional.max_pool3d_with_indices(y[:,None,None],(1,2,2))",
    "torch.nn.functional.max_pool3d": "torch.nn.functional.max_pool3d(y[:,None,None],(1,2,2))",
    "torch.max_pool3d": "torch.max_pool3d(y[:,None,None],(1,2,2))",
    "torch.nn.functional.avg_pool3d": "torch.nn.functional.avg_pool3d(y[:,None,None],(1,2,2))",
    "torch.nn.functional.adaptive_avg_pool3d": "torch.nn.functional.adaptive_avg_pool3d(y[:,None,None],(1,2,2))",
    "torch.nn.functional.adaptive_max_pool3d": "torch.nn.functional.adaptive_max_pool3d(y[:,None,None],(1,2,2))",
    "torch.nn.functional.adaptive_max_pool3d_with_indices": "torch.nn.functional.adaptive_max_pool3d_with_indices(y[:,None,None],(1,2,2))",
    "torch.nn.functional.fractional_max_pool3d": "torch.nn.functional.fractional_max_pool3d(y[:,None,None].expand(-1,1,4,4,4),2,output_size=2)",
    "torch.nn.functional.fractional_max_pool3d_with_indices": "torch.nn.functional.fractional_max_pool3d_with_indices(y[:,None,None].expand(-1,1,4,4,4),2,output_size=2)",
    "torch.nn.functional.conv2d": "torch.nn.functional.conv2d(y[:,:,:,None],z[0][:,:,None,None])",
    "torch.nn.functional.conv3d": "torch.nn.functional.conv3d(y[:,:,:,None,None],z[0][:,:,None,None,None])",
    "torch.nn.functional.conv_transpose1d": "torch.nn.functional.conv_transpose1d(y,z[0][:,:,None])",
    "torch.nn.functional.conv_transpose2d": "torch.nn.functional.conv_transpose2d(y[:,:,:,None],z[0][:,:,None,None])",
    "torch.nn.functional.conv_transpose3d": "torch.nn.functional.conv_transpose3d(y[:,:,:,None,None],z[0][:,:,None,None,None])",
    "torch.nn.functional.conv_tbc": "torch.nn.functional.conv_tbc(y,z[0][None],torch.zeros(4))",
    "torch.convolution": "torch.convolution(y,z[0][:,:,None],None,[1],[0],[1],False,[0],1)",
}

#: What no forward of an encoder's block meets, by a part of the name, and why.
NOT_MET = {
    "miopen_": "kernels of AMD's library alone",
    "fbgemm_": "weights packed into bytes for FBGEMM: no float forward",
    "quantized_": "takes quantized tensors: no float forward",
    "torch.quantize_per": "makes quantized tensors: no float forward",
    "torch.q_": "takes quantized tensors: no float forward",
    "torch.Tensor.q_": "takes quantized tensors: no float forward",
    "qscheme": "takes quantized tensors: no float forward",
    "int_repr": "takes quantized tensors: no float forward",
    "choose_qparams_optimized": "for FBGEMM's embeddings: no float forward",
    "fused_moving_avg_obs_fake_quant": "an observer of torch.ao: no float forward",
    "crow_indices": "takes sparse rows (CSR)",
    "col_indices": "takes sparse rows (CSR)",
    "row_indices": "takes sparse columns (CSC)",
    "indices_copy": "takes sparse tensors",
    "values_copy": "takes sparse tensors",
    "sparse_": "takes sparse tensors",
    "_sparse_mask_projection": "takes sparse tensors",
    "_coalesced_": "takes sparse tensors",
    "_dimI": "takes sparse tensors",
    "_dimV": "takes sparse tensors",
    "hspmm": "takes sparse tensors",
    "sspaddmm": "takes sparse tensors",
    "smm": "takes sparse tensors",
    "_nested_tensor": "takes nested tensors",
    "batch_norm_": "parts of batch normalisation over several GPUs",
    "_autocast_to": "torch.jit's own",
    "torch.Tensor.cuda": "needs a GPU; it is '.to(device)', which is tried",
    "torch.Tensor.ipu": "needs that accelerator",
    "torch.Tensor.xpu": "needs that accelerator",
    "torch.Tensor.mtia": "needs that accelerator",
    "pin_memory": "needs a GPU",
    "record_stream": "needs a GPU",
    "__cuda_array_interface__": "needs a GPU",
    "native_norm": "takes sparse tensors",
    "__setstate__": "only pickle calls it",
    "__array_wrap__": "only numpy calls it, which has a tensor's values by then",
    "torch.autocast": "a context, not an operation; entering it is refused",
    "sym_ite": "takes symbols of torch.compile",
}
